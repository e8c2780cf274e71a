"""Shards on disk: plain WebDataset tar files, a manifest, and an index of every image.

A data set is a folder of ``SPLIT-NNNNNN.tar`` (members ``KEY.jpg`` and ``KEY.json``), a
``manifest.json`` with each shard's size and checksum, and ``SPLIT.index.npy``, one row an image:
where its bytes lie and their crc32. The index makes any image one read away, so that a run can
take galaxies in any order and resume without reading what it skips.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from pydantic import BaseModel, ConfigDict, ValidationError

from astropt_ds.errors import UserError

MANIFEST = "manifest.json"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
FORMAT = "astropt_ds-shards-1"


class ShardEntry(BaseModel):
    """One tar file."""

    model_config = ConfigDict(extra="forbid")

    name: str
    samples: int
    bytes: int
    sha256: str


class SplitEntry(BaseModel):
    """One split: its shards in order, and its index."""

    model_config = ConfigDict(extra="forbid")

    samples: int
    index: str
    index_sha256: str
    shards: list[ShardEntry]


class Manifest(BaseModel):
    """What ``manifest.json`` holds."""

    model_config = ConfigDict(extra="forbid")

    format: str
    dtype: str
    channels: int
    bands: list[str]
    nan: str  # what a NaN in an image means; 8-bit images have none
    splits: dict[str, SplitEntry]

    def save(self, folder: Path) -> None:
        """Write the manifest; the same data give the same bytes."""
        (folder / MANIFEST).write_text(json.dumps(self.model_dump(), indent=1) + "\n")


class Sample(NamedTuple):
    """An image on its way into a shard."""

    key: str  # unique in its split, without dots: WebDataset splits names at the first one
    suffix: str
    image: bytes
    labels: dict[str, Any]
    width: int
    height: int


def index_dtype(key_bytes: int) -> np.dtype[Any]:
    """The row of an index: key, where the image's bytes lie in its shard, checksum, pixels."""
    return np.dtype(
        [
            ("key", f"S{max(key_bytes, 1)}"),
            ("offset", "<u8"),
            ("size", "<u4"),
            ("crc32", "<u4"),
            ("width", "<u2"),
            ("height", "<u2"),
        ]
    )


def write_split(folder: Path, split: str, samples: Iterable[Sample], per_shard: int) -> SplitEntry:
    """Write samples as shards and their index.

    Args:
        folder: where the files go.
        split: ``train``, ``val`` or ``test``; the file names begin with it.
        samples: in the order in which they are stored.
        per_shard: samples in a shard, the last one excepted.

    Returns:
        The split's entry in the manifest.
    """
    shards: list[ShardEntry] = []
    rows: list[tuple[bytes, int, int, int, int, int]] = []
    group: list[Sample] = []

    def flush() -> None:
        path = folder / f"{split}-{len(shards):06d}.tar"
        _write_tar(path, group)
        places = _image_places(path)
        for sample in group:
            offset, size = places[sample.key]
            crc = zlib.crc32(sample.image)
            rows.append((sample.key.encode(), offset, size, crc, sample.width, sample.height))
        size, digest = path.stat().st_size, sha256_file(path)
        shards.append(ShardEntry(name=path.name, samples=len(group), bytes=size, sha256=digest))
        group.clear()

    for sample in samples:
        group.append(sample)
        if len(group) == per_shard:
            flush()
    if group:
        flush()
    index = np.array(rows, dtype=index_dtype(max((len(row[0]) for row in rows), default=1)))
    path = folder / f"{split}.index.npy"
    np.save(path, index)
    return SplitEntry(
        samples=len(rows), index=path.name, index_sha256=sha256_file(path), shards=shards
    )


def _write_tar(path: Path, samples: list[Sample]) -> None:
    # fixed owner, mode and time: the same input gives the same bytes
    with webdataset.TarWriter(str(path), user="root", group="root", mode=0o644, mtime=0) as tar:
        for sample in samples:
            labels = json.dumps(sample.labels, sort_keys=True, allow_nan=False).encode()
            tar.write({"__key__": sample.key, sample.suffix: sample.image, "json": labels})


def _image_places(path: Path) -> dict[str, tuple[int, int]]:
    """Key to (offset, size) of each image's bytes in a tar file."""
    places = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if suffix in IMAGE_SUFFIXES:
                places[key] = (member.offset_data, member.size)
    return places


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check a data set's manifest.

    Raises:
        UserError: no folder, no manifest, or not one of ours.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"data.path={folder}: is no folder; tools/make_shards.py makes one")
    if not path.is_file():
        raise UserError(
            f"data.path={folder}: no {MANIFEST}, so no shards; tools/make_shards.py makes them"
        )
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: not a manifest ({where or 'JSON'}: {first['msg']})") from None
    if manifest.format != FORMAT:
        raise UserError(f"{path}: format {manifest.format!r}; {FORMAT!r} would be right")
    return manifest


class Split:
    """One split of a data set, opened for reading by row.

    Args:
        folder: the data set's folder.
        name: the split.

    Attributes:
        index: (samples,) structured array of :func:`index_dtype`, memory-mapped.
        first: (shards + 1,), the row at which each shard starts.

    Raises:
        UserError: the split is not there or empty, or a file is missing or of another size.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self.folder = Path(folder)
        self.name = name
        self.manifest = read_manifest(self.folder)
        if name not in self.manifest.splits or not self.manifest.splits[name].samples:
            known = {n: s.samples for n, s in self.manifest.splits.items()}
            raise UserError(f"data.path={folder}: no samples in split {name!r}; it holds {known}")
        self.entry = self.manifest.splits[name]
        for shard in self.entry.shards:
            path = self.folder / shard.name
            if not path.is_file():
                raise UserError(f"{path}: missing; the manifest lists it")
            if path.stat().st_size != shard.bytes:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes; the manifest says {shard.bytes}"
                )
        path = self.folder / self.entry.index
        if not path.is_file() or sha256_file(path) != self.entry.index_sha256:
            raise UserError(f"{path}: missing, or not the index that the manifest describes")
        try:
            self.index = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable index ({error})") from None
        self.first = np.concatenate([[0], np.cumsum([s.samples for s in self.entry.shards])])
        if len(self.index) != self.first[-1]:
            raise UserError(
                f"{path}: {len(self.index)} rows; the manifest says {self.first[-1]} samples"
            )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shard_samples(self) -> list[int]:
        """Samples in each shard."""
        return [shard.samples for shard in self.entry.shards]

    @property
    def hash(self) -> str:
        """Changes when any image, key or shard of the split does."""
        return hashlib.sha256(self.entry.model_dump_json().encode()).hexdigest()

    def place(self, row: int) -> tuple[str, str]:
        """(shard, key) of a row, for messages."""
        shard = int(np.searchsorted(self.first, row, side="right")) - 1
        return self.entry.shards[shard].name, self.index[row]["key"].decode()

    def smaller_than(self, side: int) -> int:
        """How many images are smaller than ``side`` along either axis."""
        return int(((self.index["width"] < side) | (self.index["height"] < side)).sum())
