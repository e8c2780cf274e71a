"""A data set against its manifest: what is missing, surplus or damaged, each fault by name."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from astropt_ds.data.manifest import MANIFEST, SplitEntry, index_dtype
from astropt_ds.data.parallel import parallel
from astropt_ds.data.shard_check import Fault, Pixels, ShardTask, check_shard
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError
from astropt_ds.files import sha256_file


@dataclass(frozen=True)
class Report:
    """What was looked at, and what is wrong.

    Attributes:
        faults: those of manifest and indices, then those of the shards in the manifest's order.
        samples: that were looked at.
        listed: samples that the manifest lists in the splits that were looked at.
        shards: that were looked at.
        splits: their names.
        bytes_read: of the shards.
    """

    faults: list[Fault]
    samples: int
    listed: int
    shards: int
    splits: tuple[str, ...]
    bytes_read: int


def verify(
    folder: Path,
    *,
    fraction: float = 1.0,
    seed: int = 0,
    split: str | None = None,
    processes: int = 1,
    decode: bool = False,
) -> Report:
    """Check a data set: its manifest, its indices and its shards.

    Args:
        folder: of the manifest.
        fraction: of each shard's samples, one at least. Below 1 the bytes of those alone are read,
            and no shard's sha256 is made.
        seed: of the choice of samples, which depends on nothing else.
        split: the one to check; all if None.
        processes: that share the shards.
        decode: decode the images, and compare them with what is declared.

    Raises:
        UserError: the folder is no data set, or an option does not fit it.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction}: above 0, and 1 at most, would be right")
    store = Folder(folder)
    manifest = store.manifest
    if split is not None and split not in manifest.splits:
        raise UserError(f"--split {split}: {folder} holds {', '.join(manifest.splits)}")
    splits = tuple(manifest.splits) if split is None else (split,)
    pixels = Pixels(manifest.dtype, manifest.channels, manifest.nan) if decode else None
    faults = [Fault(str(path), None, "is not in the manifest") for path in store.unlisted()]
    if len(manifest.bands) != manifest.channels:
        reason = f"names {len(manifest.bands)} bands for {manifest.channels} channels"
        faults.append(Fault(str(folder / MANIFEST), None, reason))
    indices: dict[str, Path] = {}  # that can be read
    tasks: list[ShardTask] = []
    split_of: list[str] = []
    for name in splits:
        entry = manifest.splits[name]
        known = _check_index(folder, name, entry, faults)
        if path := next(iter(known), None):
            indices[name] = path
        for shard, first, index in zip(entry.shards, _first_rows(entry), known, strict=True):
            path = store.shard(shard)
            tasks.append(ShardTask(path, shard, index, first, fraction, seed, pixels))
            split_of.append(name)
    faults += _in_two_splits(indices)
    listed = sum(manifest.splits[name].samples for name in splits)
    results = []
    with tqdm(total=listed, unit="image", disable=None, desc="verify") as progress:
        for task, result in zip(tasks, parallel(check_shard, tasks, processes), strict=True):
            results.append(result)
            progress.update(task.entry.samples)
    labelled = {name for name, result in zip(split_of, results, strict=True) if result.labelled}
    for name, task, result in zip(split_of, tasks, results, strict=True):
        faults += result.faults
        if name in labelled:  # shards that others wrote may have no labels at all
            faults += [Fault(str(task.path), key, "has no .json") for key in result.unlabelled]
    return Report(
        faults=faults,
        samples=sum(result.samples for result in results),
        listed=listed,
        shards=len(tasks),
        splits=splits,
        bytes_read=sum(result.bytes_read for result in results),
    )


def _check_index(
    folder: Path, name: str, entry: SplitEntry, faults: list[Fault]
) -> list[Path | None]:
    """The index for each shard of a split, None where it does not tell of it; adds to faults."""
    path = folder / entry.index
    nothing: list[Path | None] = [None] * len(entry.shards)
    total = sum(shard.samples for shard in entry.shards)

    def fault(reason: str, key: str | None = None) -> None:
        faults.append(Fault(str(path), key, reason))

    if total != entry.samples:
        reason = f"split {name!r} has {entry.samples} samples; its shards add up to {total}"
        faults.append(Fault(str(folder / MANIFEST), None, reason))
    if not path.is_file():
        fault("missing; the manifest lists it")
        return nothing
    if (size := path.stat().st_size) != entry.index_bytes:
        fault(f"{size} bytes; the manifest says {entry.index_bytes}")
    elif sha256_file(path) != entry.index_sha256:
        fault("its sha256 is not the manifest's")
    try:
        index = np.load(path, mmap_mode="r")
    except Exception as error:  # a damaged header raises whatever its text makes Python raise
        fault(f"not a readable index ({' '.join(str(error).split())})")
        return nothing
    if index.dtype.names != index_dtype(1).names:
        fault(f"not an index: its columns are {index.dtype.names}")
        return nothing
    if len(index) != total:
        fault(f"{len(index)} rows; the manifest's shards have {total} samples")
        return nothing
    for key, times in _repeated(index):
        fault(f"is in split {name!r} {times} times with the same bytes", key)
    known: list[Path | None] = []
    for shard, first in zip(entry.shards, _first_rows(entry), strict=True):
        rows = index[first : first + shard.samples]
        sound = zlib.crc32(rows.tobytes()) == shard.index_crc32
        if not sound:
            fault(f"the rows of {shard.name} do not match their checksum in {MANIFEST}")
        if sound and len(rows) and (least := int(_sides(rows).min())) != shard.smallest:
            reason = f"{shard.name}: smallest is {shard.smallest}; the index says {least} pixels"
            faults.append(Fault(str(folder / MANIFEST), None, reason))
        known.append(path if sound else None)
    return known


def _sides(rows: np.ndarray) -> np.ndarray:
    """The shortest side of each image; pixels."""
    return np.minimum(rows["width"], rows["height"])


def _in_two_splits(indices: dict[str, Path]) -> list[Fault]:
    """Images of an evaluation split that are in the training split, too, bytes and all."""
    found = []
    for name in ("val", "test"):
        if name in indices and "train" in indices:
            own, train = (np.load(indices[split], mmap_mode="r") for split in (name, "train"))
            shared = np.intersect1d(own["key"], train["key"])
            same = [i[np.isin(i["key"], shared)][["key", "size", "crc32"]] for i in (own, train)]
            for key in np.intersect1d(*same)["key"]:
                reason = "is in split 'train', too, with the same bytes"
                found.append(Fault(str(indices[name]), _text(key), reason))
    return found


def _text(key: bytes) -> str:
    return key.decode(errors="surrogateescape")


def _first_rows(entry: SplitEntry) -> list[int]:
    """The row at which each shard starts."""
    return list(accumulate([shard.samples for shard in entry.shards], initial=0))[:-1]


def _repeated(index: np.ndarray) -> list[tuple[str, int]]:
    """Keys of images that are there more than once, and how often."""
    keys = np.sort(index["key"])
    doubled = np.unique(keys[1:][keys[1:] == keys[:-1]])
    rows = index[np.isin(index["key"], doubled)]  # sorting whole rows of millions takes minutes
    found, times = np.unique(rows[["key", "size", "crc32"]], return_counts=True)
    return [
        (_text(image["key"]), int(count))
        for image, count in zip(found[times > 1], times[times > 1], strict=True)
    ]
