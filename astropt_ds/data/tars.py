"""The members of a tar file, and where it is damaged.

Python's ``tarfile``, and so WebDataset, ends in silence at a damaged header: what lies behind it is
lost without a word. Here a tar file that does not end as one should is an error.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from webdataset.tariterators import base_plus_ext

BLOCK = tarfile.BLOCKSIZE
META = re.compile("__[^/]*__($|/)")  # what WebDataset skips: no samples


class BadTarError(ValueError):
    """A tar file that is damaged or cut off; the message says how and where.

    Attributes:
        byte: where a reader stops.
    """

    def __init__(self, reason: str, byte: int) -> None:
        super().__init__(f"{reason} at byte {byte}")
        self.byte = byte


class Member(NamedTuple):
    """A file in a tar file, as WebDataset names it."""

    key: str
    suffix: str  # all behind the first dot of the base name, in lower case
    offset: int  # of its bytes
    size: int


def members(file: IO[bytes], start: int = 0) -> Iterator[Member]:
    """The members of an uncompressed tar file, in its order.

    Files that WebDataset takes for no part of a sample are passed over, as are folders and links.

    Args:
        file: open for reading, seekable.
        start: the byte at which to begin; a header, or the archive's end.

    Raises:
        BadTarError: a header is damaged, or the file does not end as a tar file does; raised after
            the members before it.
    """
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    except tarfile.ReadError as error:
        raise BadTarError(f"no tar header ({error})", start) from None
    while True:
        try:
            member = tar.next()
        except tarfile.ReadError as error:
            byte = min(tar.offset, file.seek(0, os.SEEK_END))
            raise BadTarError(f"cut off or damaged ({error})", byte) from None
        if member is None:
            break
        if member.isreg() and not META.match(member.name):
            key, suffix = base_plus_ext(member.name)
            if key is not None:
                yield Member(key, suffix.lower(), member.offset_data, member.size)
    _check_end(file, tar.offset)


def padded(end: int) -> int:
    """Where the next header starts if a member's bytes end here."""
    return -(-end // BLOCK) * BLOCK


def _check_end(file: IO[bytes], byte: int) -> None:
    """Nothing but zeros from here on, two blocks of them at least."""
    file.seek(byte)
    end = file.read(2 * BLOCK)
    if any(end[:BLOCK]):
        raise BadTarError("damaged tar header", byte)
    if len(end) < 2 * BLOCK:
        raise BadTarError("cut off", byte)
    while end:
        if any(end):
            raise BadTarError("zeros in place of a tar header", byte)
        end = file.read(2 * BLOCK)
