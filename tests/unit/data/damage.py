"""Shards as tests damage and check them."""

import hashlib
import os
import tarfile
import zlib

import numpy as np

from astropt_ds.data.manifest import MANIFEST, Manifest, parse_manifest
from astropt_ds.data.shards import Shard, write_index
from astropt_ds.data.verify import verify

SHARD = "train-000001.tar"  # of 20 samples, in mid-split


def faults(folder, **options):
    """[(file name, key, reason)] of a check."""
    return [(os.path.basename(f.file), f.key, f.reason) for f in verify(folder, **options).faults]


def manifest_of(folder) -> Manifest:
    return parse_manifest((folder / MANIFEST).read_bytes(), "manifest")


def members(folder, shard=SHARD):
    with tarfile.open(folder / shard) as tar:
        return tar.getmembers()


def change(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path, offset):
    change(path, offset, bytes([path.read_bytes()[offset] ^ 0x10]))


def seal(folder, shard=SHARD, **columns):
    """Make index and manifest agree with a shard as it is now: as if it had been written so."""
    manifest = manifest_of(folder)
    entry = manifest.splits["train"]
    index = np.load(folder / entry.index)
    first, parts = 0, []
    for known in entry.shards:
        rows = index[first : first + known.samples]
        first += known.samples
        data = (folder / known.name).read_bytes()
        for row in rows if known.name == shard else ():
            row["crc32"] = zlib.crc32(data[row["offset"] : row["offset"] + row["size"]])
            for name, value in columns.items():
                row[name] = value
        parts.append(Shard(known.name, len(data), hashlib.sha256(data).hexdigest(), rows))
    splits = {**manifest.splits, "train": write_index(folder, "train", parts)}
    manifest.model_copy(update={"splits": splits}).save(folder)
