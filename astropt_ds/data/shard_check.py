"""One shard against the manifest and its rows of the index.

Each sample is checked by itself: the headers from the image before it up to its own, its bytes, and
its labels beside it. So the check of a share reads that share only, and the check of all goes once
through the file, past any damage, and tells where it lies.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from astropt_ds.data.decode import BadImageError, check_finite, decode
from astropt_ds.data.manifest import ShardEntry
from astropt_ds.data.order import keyed_permutation
from astropt_ds.data.tars import BLOCK, BadTarError, members, padded


class Fault(NamedTuple):
    """What is wrong with a file, or with one sample in it."""

    file: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        where = self.file if self.key is None else f"{self.file} {self.key}"
        line = f"{where}: {self.reason}"
        return line.encode(errors="backslashreplace").decode()  # a name may be no UTF-8


@dataclass(frozen=True)
class Pixels:
    """What the manifest says of every image."""

    dtype: str
    channels: int
    nan: str


@dataclass(frozen=True)
class ShardTask:
    """What to check.

    Attributes:
        index: the split's index; None where it does not tell of this shard.
        first: the shard's first row in it.
        fraction: of the shard's samples, one at least; 1 checks the whole file.
        seed: of the choice of samples.
        pixels: decode every image and compare it with this; None leaves that out.
    """

    path: Path
    entry: ShardEntry
    index: Path | None
    first: int
    fraction: float
    seed: int
    pixels: Pixels | None


@dataclass
class Checked:
    """What came of it.

    Attributes:
        samples: that were looked at.
        bytes_read: of the shard.
        labelled: how many of the samples have a ``.json``.
        unlabelled: the keys of those that have none.
    """

    faults: list[Fault] = field(default_factory=list)
    samples: int = 0
    bytes_read: int = 0
    labelled: int = 0
    unlabelled: list[str] = field(default_factory=list)


def check_shard(task: ShardTask) -> Checked:
    """Check one shard; whatever is wrong with it is in the answer."""
    try:
        with _CountedFile(task.path) as file:
            check = _ShardCheck(task, file)
            check.run()
            check.result.bytes_read = file.count
            return check.result
    except FileNotFoundError:
        return Checked([Fault(str(task.path), None, "missing; the manifest lists it")])
    except OSError as error:
        return Checked([Fault(str(task.path), None, f"cannot be read ({error.strerror})")])


def chosen(task: ShardTask) -> np.ndarray:
    """The numbers of the samples to check, ascending; they depend on shard and seed alone."""
    samples = task.entry.samples
    count = max(1, round(task.fraction * samples))
    return np.sort(keyed_permutation(samples, "verify", task.seed, task.entry.name)[:count])


class _CountedFile(io.FileIO):
    """An unbuffered file that counts the bytes it gives."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data

    def part(self, offset: int, size: int) -> bytes:
        data = os.pread(self.fileno(), size, offset)
        self.count += len(data)
        return data


class _ShardCheck:
    def __init__(self, task: ShardTask, file: _CountedFile) -> None:
        self.task = task
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.result = Checked()
        self.flipped = 0
        self.lost = 0  # samples that the file is too short for
        self.stops: set[int] = set()
        self.digest = hashlib.sha256()
        self.hashed = 0
        last = task.first + task.entry.samples
        self.rows = np.load(task.index, mmap_mode="r")[task.first : last] if task.index else None

    def run(self) -> None:
        entry, rows = self.task.entry, self.rows
        whole = self.task.fraction == 1
        if self.size != entry.bytes:
            self._fault(None, f"{self.size} bytes; the manifest says {entry.bytes}")
        if rows is not None and len(rows):
            here = int((rows["offset"] + rows["size"] <= self.size).sum())
            self.lost = len(rows) - here
            if self.lost:
                lost = f"{self.lost} of {len(rows)} samples are lost, from {self._key(here)} on"
                self._fault(None, f"truncated: {lost}")
            for number in chosen(self.task):
                if number < here:
                    self._check_sample(int(number), whole)
        if not self.lost:
            self._check_tail()
        if whole and self.size == entry.bytes:
            self._check_sha256()

    def _check_sample(self, number: int, whole: bool) -> None:
        assert self.rows is not None
        row = self.rows[number]
        offset, size = int(row["offset"]), int(row["size"])
        self.result.samples += 1
        self._check_headers(number)
        if whole:
            self._hash_up_to(offset)
        data = self.file.part(offset, size)
        if whole:
            self.digest.update(data)
            self.hashed = offset + size
        if zlib.crc32(data) != int(row["crc32"]):
            self.flipped += 1
            self._fault(self._key(number), "its bytes do not match their crc32 in the index")
        elif self.task.pixels:
            self._check_pixels(number, data, self.task.pixels)

    def _check_headers(self, number: int) -> None:
        """The tar headers between the image before and this one, and those of its own labels."""
        assert self.rows is not None
        row, key = self.rows[number], self._key(number)
        offset, size = int(row["offset"]), int(row["size"])
        found = labelled = False
        try:
            for member in members(self.file, self._end_of(number - 1)):
                if member.offset == offset:
                    found = True
                    if (member.key, member.size) != (key, size):
                        self._fault(
                            key,
                            f"its tar header says {member.key}, {member.size} bytes; not {size}",
                        )
                elif member.offset > offset and (not found or member.key != key):
                    break
                labelled |= member.suffix == "json" and member.key == key
        except BadTarError as error:
            self._fault_of_tar(error)
            return
        if not found:
            self._fault(key, f"the tar file has no member at byte {offset}, its place")
        elif labelled:
            self.result.labelled += 1
        else:
            self.result.unlabelled.append(key)

    def _check_pixels(self, number: int, data: bytes, pixels: Pixels) -> None:
        assert self.rows is not None
        try:
            image = decode(data)
            check_finite(image, keep=pixels.nan == "zero")
        except BadImageError as error:
            self._fault(self._key(number), str(error))
            return
        row = self.rows[number]
        is_ = _looks(image.shape[1], image.shape[0], image.shape[2], str(image.dtype))
        declared = _looks(row["width"], row["height"], pixels.channels, pixels.dtype)
        if is_ != declared:
            self._fault(self._key(number), f"is {is_}; declared is {declared}")

    def _check_tail(self) -> None:
        """What follows the last image is sound up to the archive's end."""
        try:
            for _ in members(self.file, self._end_of(self.task.entry.samples - 1)):
                pass
        except BadTarError as error:
            self._fault_of_tar(error)

    def _check_sha256(self) -> None:
        self._hash_up_to(self.size)
        if self.digest.hexdigest() == self.task.entry.sha256:
            return
        if self.rows is None:
            where = "which samples, only a sound index tells"
        elif self.flipped:
            where = f"{self.flipped} of {len(self.rows)} images differ"
        else:
            where = "all images match their crc32: the damage lies in labels or headers"
        self._fault(None, f"its sha256 is not the manifest's; {where}")

    def _hash_up_to(self, end: int) -> None:
        while self.hashed < end:
            block = self.file.part(self.hashed, min(1 << 20, end - self.hashed))
            if not block:  # cut off while it is read
                return
            self.digest.update(block)
            self.hashed += len(block)

    def _fault(self, key: str | None, reason: str) -> None:
        self.result.faults.append(Fault(str(self.task.path), key, reason))

    def _fault_of_tar(self, error: BadTarError) -> None:
        """A damage by the sample that it hits, or else by the image that it follows."""
        if error.byte in self.stops:  # met from the sample before it already
            return
        if self.lost and error.byte + BLOCK > self.size:  # the end of a file known to be cut off
            return
        self.stops.add(error.byte)
        key, after = None, ""
        if self.rows is not None and len(self.rows):
            number = int(np.searchsorted(self.rows["offset"], error.byte, side="right"))
            if number < len(self.rows) and int(self.rows[number]["offset"]) - BLOCK == error.byte:
                key = self._key(number)
            elif number:
                after = f", after the image of {self._key(number - 1)}"
        self._fault(key, f"{error}{after}: plain tar readers stop there")

    def _key(self, number: int) -> str:
        assert self.rows is not None
        return self.rows[number]["key"].decode(errors="surrogateescape")

    def _end_of(self, number: int) -> int:
        if self.rows is None or number < 0:
            return 0
        return padded(int(self.rows[number]["offset"]) + int(self.rows[number]["size"]))


def _looks(width: int, height: int, channels: int, dtype: str) -> str:
    return f"{width} x {height} pixels of {channels} channels, {dtype}"
