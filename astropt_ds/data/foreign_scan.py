"""One shard that others wrote: what is in it, and its rows of an index.

First come the headers of all shards, which takes a moment: what stops the whole is told before any
work is done. Then every image is decoded.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from astropt_ds.data.decode import BadImageError, check_finite, decode
from astropt_ds.data.manifest import MAX_SIDE, index_dtype
from astropt_ds.data.rejected import Rejected
from astropt_ds.data.shards import IMAGE_SUFFIXES
from astropt_ds.data.tars import BadTarError, Member, members
from astropt_ds.errors import UserError
from astropt_ds.files import sha256_file

Kind = tuple[str, int]  # dtype and channels of an image
Row = tuple[bytes, int, int, int, int, int]  # as index_dtype has them


@dataclass(frozen=True)
class Source:
    """A shard, and which member of a key is its image; any with an image's suffix if None."""

    folder: Path
    name: str
    member: str | None
    keep_nan: bool  # images with pixels that are not finite

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / self.name

    def samples(self) -> dict[str, list[Member]]:
        """The members of each key; raises BadTarError."""
        found: dict[str, list[Member]] = {}
        with self.path.open("rb") as file:
            for member in members(file):
                found.setdefault(member.key, []).append(member)
        return found

    def images(self, sample: list[Member]) -> list[Member]:
        """Those members of a key that could be its image."""
        if self.member is not None:
            return [m for m in sample if m.suffix == self.member.lower()]
        return [m for m in sample if m.suffix.rpartition(".")[2] in IMAGE_SUFFIXES]


@dataclass(frozen=True)
class Headers:
    """The number of samples in a shard, or what is wrong with it as a whole."""

    samples: int = 0
    damage: str | None = None


@dataclass(frozen=True)
class Scanned:
    """A shard, its rows of the index by the kind of their images, and what is left out."""

    name: str
    bytes: int
    sha256: str
    rows: dict[Kind, np.ndarray]
    rejected: list[Rejected]

    @property
    def samples(self) -> int:
        """All that are in the shard."""
        return len(self.rejected) + sum(map(len, self.rows.values()))


def scan_headers(source: Source) -> Headers:
    """Go through the headers of a shard.

    Raises:
        UserError: a key has several images.
    """
    try:
        samples = source.samples()
    except BadTarError as error:
        return Headers(damage=f"{source.path}: {error}")
    except OSError as error:
        return Headers(damage=f"{source.path}: cannot be read ({error.strerror})")
    for key, sample in samples.items():
        choices = sorted({member.suffix for member in source.images(sample)})
        if len(choices) > 1:
            raise UserError(
                f"{source.path}: {key} has {len(choices)} images; "
                f"--member {' or --member '.join(choices)} would be right"
            )
    return Headers(len(samples))


def scan_images(source: Source) -> Scanned:
    """Decode the images of a shard.

    Raises:
        UserError: it is not as it was when its headers were read.
    """
    rows: dict[Kind, list[Row]] = {}
    rejected = []
    try:
        with source.path.open("rb") as file:
            for key, sample in source.samples().items():
                try:
                    kind, row = _row(
                        file.fileno(), key, _only_image(source, sample), source.keep_nan
                    )
                    rows.setdefault(kind, []).append(row)
                except BadImageError as error:
                    rejected.append(Rejected(key, source.name, str(error)))
        size, sha256 = source.path.stat().st_size, sha256_file(source.path)
    except (BadTarError, OSError) as error:
        raise UserError(f"{source.path}: cannot be read any more ({error})") from None
    indices = {kind: _index(found) for kind, found in rows.items()}
    return Scanned(source.name, size, sha256, indices, rejected)


def _only_image(source: Source, sample: list[Member]) -> Member:
    images = source.images(sample)
    if not images:
        others = ", ".join(sorted({member.suffix for member in sample}))
        raise BadImageError(f"has no {source.member or 'image'}, only {others}")
    if len(images) > 1:
        raise BadImageError(f"is there {len(images)} times in its shard")
    if images[0].link:
        raise BadImageError("is a link in the tar file, without bytes of its own")
    return images[0]


def _row(descriptor: int, key: str, image: Member, keep_nan: bool) -> tuple[Kind, Row]:
    data = os.pread(descriptor, image.size, image.offset)
    pixels = decode(data)
    height, width, channels = pixels.shape
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise BadImageError(f"is {width} x {height} pixels; 1 to {MAX_SIDE} would be right")
    check_finite(pixels, keep_nan)
    name = key.encode(errors="surrogateescape")
    row = name, image.offset, image.size, zlib.crc32(data), width, height
    return (str(pixels.dtype), channels), row


def _index(rows: list[Row]) -> np.ndarray:
    """Rows as an index holds them, in the order of the file."""
    rows = sorted(rows, key=lambda row: row[1])
    return np.array(rows, dtype=index_dtype(max(len(row[0]) for row in rows)))
