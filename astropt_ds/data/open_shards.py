"""Shards that are open for reading: the bytes of a sample's image, and what is said beside it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from astropt_ds.data.decode import BadImageError
from astropt_ds.data.split import Split
from astropt_ds.data.tars import BadTarError, members, padded


class DamagedError(BadImageError):
    """A shard does not hold what its index says: another copy of it may."""


class OpenShards:
    """Reads from shards, which stay open: so many at most, those used last.

    Args:
        limit: of open files.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: dict[str, int] = {}  # shard's file to its descriptor

    def descriptor(self, split: Split, number: int) -> int:
        """Of a split's shard; it belongs to this object.

        Raises:
            UserError: a shard that cannot be used as a whole.
        """
        name = split.store.file(split.entry.shards[number].name)
        descriptor = self._open.pop(name, None)
        if descriptor is None:
            if len(self._open) >= self.limit:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = split.open_shard(number)
        self._open[name] = descriptor  # at the end: used last
        return descriptor

    def image(self, split: Split, row: int, descriptor: int) -> bytes:
        """The bytes of a row's image.

        Raises:
            DamagedError: they are not those that the index describes.
            OSError: they cannot be read.
        """
        entry = split.index[row]
        size, offset = int(entry["size"]), int(entry["offset"])
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise DamagedError(f"ends after {len(data)} of {size} bytes")
        if zlib.crc32(data) != int(entry["crc32"]):
            raise DamagedError("its bytes do not match the checksum in the index")
        return data

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])


def read_labels(
    descriptor: int, split: Split, rows: np.ndarray
) -> Iterator[dict[str, Any] | BadImageError]:
    """What the JSON beside each image says, or what is wrong with it; empty where there is none.

    Only the headers between these rows' neighbours are looked at.

    Args:
        descriptor: of the shard that holds the rows.
        split: of the rows.
        rows: (images,) that follow each other, in one shard.
    """
    shard = split.shard_of(int(rows[0]))
    start, end = 0, os.fstat(descriptor).st_size
    if rows[0] > split.first[shard]:
        before = split.index[rows[0] - 1]
        start = padded(int(before["offset"]) + int(before["size"]))
    if rows[-1] + 1 < split.first[shard + 1]:
        end = int(split.index[rows[-1] + 1]["offset"])
    found: dict[str, bytes] = {}
    problem = None
    with open(os.dup(descriptor), "rb") as file:
        try:
            for member in members(file, start):
                if member.offset >= end:
                    break
                if member.suffix == "json" and not member.link:
                    found[member.key] = os.pread(descriptor, member.size, member.offset)
        except BadTarError as error:
            problem = DamagedError(f"the shard is damaged near it ({error})")
    for row in rows:
        key = split.index[row]["key"].decode("utf-8", "surrogateescape")
        if key in found:
            yield _parsed(found[key])
        else:
            yield problem or {}


def _parsed(data: bytes) -> dict[str, Any] | BadImageError:
    try:
        labels = json.loads(data)
    except ValueError as error:
        return BadImageError(f"the JSON beside it cannot be read ({error})")
    if not isinstance(labels, dict):
        return BadImageError("the JSON beside it is no object")
    return labels
