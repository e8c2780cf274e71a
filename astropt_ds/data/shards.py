"""Shards on disk: plain WebDataset tar files, written whole or not at all, and their index.

A sample is two members, ``KEY.jpg`` (or png, or npy for fluxes) and ``KEY.json``. The index makes
any image one read away, so that a run can take galaxies in any order and resume without reading
what it skips.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset

from astropt_ds.data.manifest import ShardEntry, SplitEntry, index_dtype
from astropt_ds.data.tars import members
from astropt_ds.files import sha256_file, sync_file

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "npy")


class Sample(NamedTuple):
    """An image on its way into a shard."""

    key: str  # unique in its split, without dots: WebDataset splits names at the first one
    suffix: str
    image: bytes
    labels: dict[str, Any]
    width: int
    height: int


@dataclass(frozen=True)
class Shard:
    """A tar file and its rows of the index."""

    name: str
    bytes: int
    sha256: str
    rows: np.ndarray  # (samples,) of index_dtype


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write samples as a tar file, which appears complete or not at all.

    The same samples give the same bytes. A shard without samples is an empty tar file.
    """
    partial = path.with_name(path.name + ".partial")
    facts = {}
    # fixed owner, mode and time: the same input gives the same bytes
    with webdataset.TarWriter(str(partial), user="root", group="root", mode=0o644, mtime=0) as tar:
        for sample in samples:
            labels = json.dumps(sample.labels, sort_keys=True, allow_nan=False).encode()
            tar.write({"__key__": sample.key, sample.suffix: sample.image, "json": labels})
            facts[sample.key] = zlib.crc32(sample.image), sample.width, sample.height
    rows = [
        (key.encode(), offset, size, *facts[key]) for key, offset, size in _image_places(partial)
    ]
    index = np.array(rows, dtype=index_dtype(max((len(row[0]) for row in rows), default=1)))
    shard = Shard(path.name, partial.stat().st_size, sha256_file(partial), index)
    sync_file(partial)
    os.replace(partial, path)
    return shard


def write_index(folder: Path, split: str, shards: list[Shard]) -> SplitEntry:
    """Write the index of a split's shards, in their order; returns the manifest's entry."""
    widest = max((shard.rows["key"].dtype.itemsize for shard in shards), default=1)
    parts = [shard.rows.astype(index_dtype(widest)) for shard in shards]
    index = np.concatenate(parts) if parts else np.empty(0, index_dtype(widest))
    path = folder / f"{split}.index.npy"
    np.save(path, index)
    return SplitEntry(
        samples=len(index),
        index=path.name,
        index_bytes=path.stat().st_size,
        index_sha256=sha256_file(path),
        shards=[
            ShardEntry(
                name=shard.name,
                samples=len(rows),
                bytes=shard.bytes,
                sha256=shard.sha256,
                smallest=_smallest(rows),
                index_crc32=zlib.crc32(rows.tobytes()),
            )
            for shard, rows in zip(shards, parts, strict=True)
        ],
    )


def _smallest(rows: np.ndarray) -> int:
    return int(min(rows["width"].min(), rows["height"].min())) if len(rows) else 0


def _image_places(path: Path) -> list[tuple[str, int, int]]:
    """(key, offset, size) of each image's bytes in a tar file, in the order of the file."""
    with path.open("rb") as file:
        return [(m.key, m.offset, m.size) for m in members(file) if m.suffix in IMAGE_SUFFIXES]
