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
META = re.compile(r"^__[^/]*__($|/)|(^|/)\._")  # no samples: what WebDataset skips, and macOS adds


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
    link: bool  # to another member, without bytes of its own


def members(file: IO[bytes], start: int = 0) -> Iterator[Member]:
    """The members of an uncompressed tar file, in its order.

    Files that WebDataset takes for no part of a sample are passed over, as are folders.

    Args:
        file: open for reading, seekable.
        start: the byte at which to begin; a header, or the archive's end.

    Raises:
        BadTarError: a header is damaged, a member is sparse, or the file does not end as a tar file
            does; raised after the members before it.
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
        if member.issparse():  # its bytes do not lie there as they are
            raise BadTarError(f"{member.name} is a sparse file", member.offset)
        link = member.islnk() or member.issym()
        if (member.isreg() or link) and not META.search(member.name):
            key, suffix = base_plus_ext(member.name)
            if key is not None:
                size = 0 if link else member.size
                yield Member(key, suffix.lower(), member.offset_data, size, link)
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
