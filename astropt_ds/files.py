"""Files that outlast a power cut, and their checksums."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


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
    with replacing(path) as partial:
        write_durably(partial, text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file at, which takes another's place when the block succeeds.

    Its name is nobody else's, should two processes be at the same file, and begins with ``_``, by
    which readers of data sets know what is no part of one.
    """
    partial = path.with_name(f"_{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield partial
        sync_file(partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the files that killed processes were :func:`replacing` in a folder."""
    for path in folder.glob(f"_*{PARTIAL}"):
        path.unlink(missing_ok=True)


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A path to write a file or a folder at, which gets its name only when the block succeeds.

    It is in a folder ``NAME.partial`` meanwhile.

    Raises:
        FileExistsError: something has either name.
    """
    if final.exists():
        raise FileExistsError(errno.EEXIST, "exists already", str(final))
    partial = final.with_name(final.name + PARTIAL)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        left = f"{partial} exists, of a command that still runs or was cut off: then delete it"
        raise FileExistsError(errno.EEXIST, left, str(final)) from None
    try:
        staging = partial / final.name
        yield staging
        sync_folder(staging) if staging.is_dir() else sync_file(staging)
        staging.rename(final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(partial)


def nearest_folder(path: Path) -> Path:
    """The path itself, or what is there of the folders that it would be made in."""
    while not path.exists():
        path = path.absolute().parent
    return path


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
