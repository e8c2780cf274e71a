"""Remote files in a local folder of bounded size, shared by all processes of a machine.

A file is named by its checksum, fetched once by whichever process first needs it, verified, and
renamed into place; the least recently used make room. Processes agree through locks on files,
which the system releases when a process dies.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from astropt_ds.data.transfer import Transfer, with_retries
from astropt_ds.errors import UserError
from astropt_ds.files import sha256_file

PARTIAL = ".partial"


class Cache:
    """A folder of fetched files.

    Args:
        folder: made if need be.
        limit: bytes that all files in it may have together.
        retries: of a failed transfer, after 1, 2, 4, ... seconds.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int, retries: int) -> None:
        self.folder, self.limit, self.retries = folder, limit, retries
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache={folder}: no folder can be made ({error})") from None

    def open(self, transfer: Transfer, name: str, size: int, sha256: str) -> int:
        """A descriptor of a file, fetched if it is not there.

        It stays readable when the file makes room for others.

        Raises:
            UserError: it cannot be fetched, or does not fit.
        """
        path = self._path(name, sha256)
        with self._locked(path.name):
            while (descriptor := _open(path)) is None:  # it may make room at any moment
                self._fetch(transfer, name, size, sha256, path)
        now = time.time_ns()  # the system's own stamps are milliseconds apart
        os.utime(descriptor, ns=(now, now))
        return descriptor

    def fetch_unless_busy(self, transfer: Transfer, name: str, size: int, sha256: str) -> None:
        """Fetch a file ahead of its use; left alone where another process is at it.

        Raises:
            UserError: it cannot be fetched, or does not fit.
        """
        path = self._path(name, sha256)
        with self._locked(path.name, wait=False) as mine:
            if mine and not path.exists():
                self._fetch(transfer, name, size, sha256, path)

    def _path(self, name: str, sha256: str) -> Path:
        return self.folder / f"{sha256[:32]}-{Path(name).name}"

    def _fetch(self, transfer: Transfer, name: str, size: int, sha256: str, path: Path) -> None:
        partial = path.with_name(path.name + PARTIAL)

        def fetch() -> None:
            while not self._make_room(partial, size):
                time.sleep(0.1)  # until what others are fetching is complete, and may be dropped
            try:
                transfer.fetch(name, partial)
                if (got := partial.stat().st_size) != size:
                    raise OSError(f"{got} bytes came; the manifest says {size}")
                if sha256_file(partial) != sha256:
                    raise OSError("what came does not match its checksum in the manifest")
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

        with_retries(fetch, self.retries, transfer.full(name))

    def _make_room(self, partial: Path, size: int) -> bool:
        """Reserve a file's place by an empty one of its size, dropping what was used least.

        Returns whether there was room; what is being fetched stays.
        """
        if size > self.limit:
            raise UserError(
                f"data.cache_gb={self.limit / 1e9:g}: {partial.name.removesuffix(PARTIAL)} alone "
                f"has {size / 1e9:g}"
            )
        with self._locked("folder"):
            files = _files(self.folder)
            total = sum(facts.st_size for _, facts in files)
            for path, facts in sorted(files, key=lambda file: file[1].st_mtime_ns):
                if total + size <= self.limit:
                    break
                if path.suffix != PARTIAL or self._abandoned(path):
                    path.unlink(missing_ok=True)
                    total -= facts.st_size
            if total + size > self.limit:
                return False
            with partial.open("wb") as file:
                file.truncate(size)
            return True

    def _abandoned(self, partial: Path) -> bool:
        """Whether whoever was fetching a file has died."""
        with self._locked(partial.name.removesuffix(PARTIAL), wait=False) as free:
            return free

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a file, or yield False where another process does."""
        with (self.folder / "locks" / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of a folder, some of which may be gone by now."""
    found = []
    for entry in os.scandir(folder):
        try:
            if entry.is_file():
                found.append((Path(entry.path), entry.stat()))
        except FileNotFoundError:  # renamed or dropped since
            continue
    return found
