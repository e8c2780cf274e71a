"""Files that outlast a power cut, and their checksums."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Write a text; it is on the disk when this returns.

    Raises:
        OSError: it cannot be; unlike Python's own, it names the file.
    """
    try:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def replace_durably(path: Path, text: str) -> None:
    """Write a text in place of what the file held; it holds either at any moment.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    write_durably(partial, text)
    os.replace(partial, path)
    sync_folder(path.parent)


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A path to write a file or a folder at, which gets its name only when the block succeeds.

    Raises:
        FileExistsError: something has the name.
    """
    if final.exists():
        raise FileExistsError(errno.EEXIST, "exists already", str(final))
    staging = final.with_name(final.name + ".partial")
    _remove(staging)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield staging
        sync_folder(staging) if staging.is_dir() else sync_file(staging)
        staging.rename(final)
        sync_folder(final.parent)
    finally:
        _remove(staging)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Return when a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
