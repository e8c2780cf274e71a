"""Shards that others wrote: a manifest and an index for plain WebDataset tar files, as they lie.

Every image is decoded once. What cannot be used stays out of the index, is counted, and is listed
with its reason in ``rejected.csv`` beside it. A shard that is damaged as a whole is no part of a
data set: all such are named, and nothing is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from astropt_ds.data.foreign_scan import Kind, Scanned, Source, scan_headers, scan_images
from astropt_ds.data.foreign_splits import find_shards
from astropt_ds.data.manifest import FORMAT, MANIFEST, SPLITS, Manifest, index_dtype
from astropt_ds.data.parallel import parallel
from astropt_ds.data.rejected import REJECTED, Rejected, write_rejected
from astropt_ds.data.shards import Shard, write_index
from astropt_ds.errors import UserError


@dataclass(frozen=True)
class Report:
    """What became of the shards.

    Attributes:
        damaged: what is wrong with each shard that cannot be used; if any, nothing was written.
        samples: in the index, by split.
        rejected: samples that are left out of it.
        named: whether the names of the shards tell their splits; if not, all are ``train``.
        compressed: tar files that were passed over because they are compressed.
    """

    damaged: list[str]
    samples: dict[str, int]
    rejected: int
    named: bool
    compressed: int


def index_shards(
    folder: Path,
    *,
    output: Path | None = None,
    globs: dict[str, str] | None = None,
    member: str | None = None,
    keep_nan: bool = False,
    processes: int = 1,
) -> Report:
    """Write ``manifest.json`` and the index of each split for shards that are there.

    Args:
        folder: the shards lie in it or below; they are only read.
        output: where to write; beside the shards if None.
        globs: {split: pattern of shard names}; if there are none the names tell the splits.
        member: the suffix of the image, all behind the key's dot, where a key has several.
        keep_nan: fluxes with pixels that are not finite stay, to be read as zero there.
        processes: that share the shards.

    Raises:
        UserError: there are no shards or no usable images, or it cannot be told which member is the
            image or in which split a shard is; or the output cannot be written.
    """
    found = find_shards(folder, globs or {})
    target = output or folder
    if (target / MANIFEST).exists():
        raise UserError(f"{target / MANIFEST}: exists already; remove it to list the shards anew")
    sources = [
        Source(folder, name, member, keep_nan) for names in found.splits.values() for name in names
    ]
    root = None if target.resolve() == folder.resolve() else str(folder.resolve())
    new = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        # made first, lest a folder that cannot be written to is found out after hours
        partial = Path(tempfile.mkdtemp(prefix=".index-", dir=target))
        try:
            damaged, count = _scan_headers(sources, processes)
            if damaged:
                return Report(damaged, {}, 0, found.named, found.compressed)
            scanned = _scan_images(sources, count, processes)
            samples, rejected = _write(found.splits, scanned, root, keep_nan, partial)
            _publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if new and not (target / MANIFEST).exists():
                target.rmdir()
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); --output names another folder"
        ) from None
    return Report([], samples, rejected, found.named, found.compressed)


def _scan_headers(sources: list[Source], processes: int) -> tuple[list[str], int]:
    """What is wrong with each damaged shard, and the number of samples in the others."""
    damaged, count = [], 0
    with tqdm(total=len(sources), unit="shard", disable=None, desc="headers") as progress:
        for result in parallel(scan_headers, sources, processes):
            if result.damage:
                damaged.append(result.damage)
            count += result.samples
            progress.update()
    return damaged, count


def _scan_images(sources: list[Source], count: int, processes: int) -> list[Scanned]:
    scanned = []
    with tqdm(total=count, unit="image", disable=None, desc="index") as progress:
        for shard in parallel(scan_images, sources, processes):
            scanned.append(shard)
            progress.update(shard.samples)
    return scanned


def _write(
    splits: dict[str, list[str]],
    scanned: list[Scanned],
    root: str | None,
    keep_nan: bool,
    folder: Path,
) -> tuple[dict[str, int], int]:
    """Write indices, manifest and what is left out; the samples of each split, and left out."""
    rejected = [line for shard in scanned for line in shard.rejected]
    dtype, channels = kind = _commonest_kind(scanned, rejected)
    shards = {shard.name: _of_kind(shard, kind, rejected) for shard in scanned}
    entries = {}
    # what is in training, too, is of no use to measure with: there it is left out
    names = [name for split in ("val", "test", "train") for name in splits[split]]
    once = _without_repeats([shards[name] for name in names], rejected)
    unique = dict(zip(names, once, strict=True))
    for split in SPLITS:
        entries[split] = write_index(folder, split, [unique[name] for name in splits[split]])
    facts: dict[str, Any] = {"dtype": dtype, "channels": channels}  # checked by the manifest
    facts["bands"] = ["R", "G", "B"] if dtype == "uint8" else [f"band{i}" for i in range(channels)]
    facts["nan"] = "zero" if dtype == "float32" and keep_nan else "none"
    Manifest(format=FORMAT, **facts, root=root, splits=entries).save(folder)
    if rejected:
        write_rejected(folder, rejected)
    return {split: entry.samples for split, entry in entries.items()}, len(rejected)


def _publish(partial: Path, target: Path) -> None:
    """Move what was written to where it belongs; the manifest, which makes it count, at last."""
    (target / REJECTED).unlink(missing_ok=True)  # of an earlier manifest
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):
        os.replace(path, target / path.name)


def _commonest_kind(scanned: list[Scanned], rejected: list[Rejected]) -> Kind:
    kinds: Counter[Kind] = Counter()
    for shard in scanned:
        kinds.update({kind: len(rows) for kind, rows in shard.rows.items()})
    if kinds:
        return kinds.most_common(1)[0][0]
    if not rejected:
        raise UserError(f"{scanned[0].name}: no samples in it, nor in any other shard")
    key, name, reason = rejected[0]
    raise UserError(
        f"none of {len(rejected)} samples is usable; the first, {key} in {name}: {reason}"
    )


def _of_kind(shard: Scanned, kind: Kind, rejected: list[Rejected]) -> Shard:
    """The shard with the images of one kind; the others are rejected."""
    for (dtype, channels), rows in shard.rows.items():
        if (dtype, channels) != kind:
            reason = f"is {dtype} of {channels} channels; most are {kind[0]} of {kind[1]}"
            rejected += [Rejected(_text(key), shard.name, reason) for key in rows["key"]]
    rows = shard.rows.get(kind, np.empty(0, index_dtype(1)))
    return Shard(shard.name, shard.bytes, shard.sha256, rows)


def _without_repeats(shards: list[Shard], rejected: list[Rejected]) -> list[Shard]:
    """The shards without what is in those before: the same image under the same key.

    A key may name other images in other shards: some sets are numbered anew in each.
    """
    if not shards:
        return shards
    widest = max(shard.rows["key"].dtype.itemsize for shard in shards)
    rows = np.concatenate([shard.rows.astype(index_dtype(widest)) for shard in shards])
    ends = np.cumsum([len(shard.rows) for shard in shards])
    same = ["key", "size", "crc32"]
    _, first, number = np.unique(rows[same], return_index=True, return_inverse=True)
    original = first[number]  # the row at which each row's image is met first
    kept = original == np.arange(len(rows))
    for row, other in zip(np.flatnonzero(~kept), original[~kept], strict=True):
        here, there = (shards[int(np.searchsorted(ends, r, "right"))].name for r in (row, other))
        rejected.append(Rejected(_text(rows[row]["key"]), here, f"is in {there} already"))
    parts = np.split(kept, ends[:-1])
    return [replace(s, rows=s.rows[part]) for s, part in zip(shards, parts, strict=True)]


def _text(key: bytes) -> str:
    return key.decode(errors="surrogateescape")
