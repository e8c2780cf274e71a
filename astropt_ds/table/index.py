"""Where each id is: ``_index.npy``, sorted by a hash of the ids, for reading by memory map.

It is made in bounded memory: hashes go to files by their leading bits, and each file is sorted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa

from astropt_ds.errors import UserError, one_line
from astropt_ds.files import replacing
from astropt_ds.table.schema import ID

INDEX, SCRATCH = "_index.npy", "_index-"
ROW = np.dtype([("hash", "<u8"), ("part", "<u4"), ("row", "<u4")])
BUCKET_ROWS = 2_000_000  # sorted in memory at once, about
MOST_BITS = 9  # 512 buckets: files that are open at once
LISTED = 100  # duplicated ids that are named


class Ids(Protocol):
    """A part of a table."""

    @property
    def rows(self) -> int:
        """In the part."""

    def read(self, columns: list[str] | None = None, rows: np.ndarray | None = None) -> pa.Table:
        """Some columns of some rows."""


@dataclass
class Duplicates:
    """Ids that several rows have."""

    count: int = 0  # rows beyond the first of each id
    ids: list[str] = field(default_factory=list)  # some of them


def hash_ids(ids: Sequence[str]) -> np.ndarray:
    """A 64-bit hash of each id, the same on any machine."""
    return pd.util.hash_array(np.asarray(ids, dtype=object), categorize=False)


def write_index(folder: Path, parts: Sequence[Ids]) -> Duplicates:
    """Write the index of a table, and find the ids that are there twice.

    Args:
        folder: of the table.
        parts: in their order; 4e9 rows each at most.
    """
    total = sum(part.rows for part in parts)
    bits = min(MOST_BITS, (total // BUCKET_ROWS).bit_length())
    found = Duplicates()
    with (
        tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch,
        replacing(folder / INDEX) as partial,
    ):
        _deal_out(parts, Path(scratch), bits)
        with partial.open("wb") as output:
            header = {"descr": ROW.descr, "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(output, header)
            for bucket in range(1 << bits):
                rows = np.fromfile(_bucket(Path(scratch), bucket), ROW)
                rows.sort(order=["hash", "part", "row"])
                rows.tofile(output)
                _add_duplicates(rows, parts, found)
    return found


def load_index(folder: Path) -> np.ndarray:
    """The index of a table's folder: (rows,) of ROW, mapped into memory.

    Raises:
        UserError: it has none.
    """
    path = folder / INDEX
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({one_line(error)}); tools/export_embeddings.py makes a "
            "table that has one"
        ) from None
    return rows


def make_index(parts: Sequence[Ids]) -> np.ndarray:
    """The index of some parts, (rows,) of ROW, in memory."""
    rows = np.concatenate([_hashed(number, part) for number, part in enumerate(parts)])
    rows.sort(order=["hash", "part", "row"])
    return rows


def find(index: np.ndarray, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows that may hold some ids: others have the same hash once in 1e19 pairs.

    Args:
        index: (rows,) of ROW, sorted.
        ids: wanted.

    Returns:
        (matches,) places among the ids, and (matches,) of ROW.
    """
    hashes = hash_ids(ids)
    column = index["hash"]
    first = np.searchsorted(column, hashes, side="left")
    counts = np.searchsorted(column, hashes, side="right") - first
    places = np.repeat(np.arange(len(hashes)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return places, index[np.repeat(first, counts) + within]


def _hashed(number: int, part: Ids) -> np.ndarray:
    """The rows of a part, in its order."""
    hashes = hash_ids(part.read([ID])[ID].to_numpy(zero_copy_only=False))
    rows = np.empty(len(hashes), ROW)
    rows["hash"], rows["part"], rows["row"] = hashes, number, np.arange(len(hashes))
    return rows


def _deal_out(parts: Sequence[Ids], scratch: Path, bits: int) -> None:
    files: list[IO[bytes]] = [_bucket(scratch, number).open("wb") for number in range(1 << bits)]
    try:
        for number, part in enumerate(parts):
            rows = _hashed(number, part)
            hashes = rows["hash"]
            buckets = hashes >> np.uint64(64 - bits) if bits else np.zeros(len(rows), np.uint64)
            order = np.argsort(buckets, kind="stable")
            cuts = np.searchsorted(buckets[order], np.arange(len(files) + 1, dtype=np.uint64))
            for file, first, last in zip(files, cuts, cuts[1:], strict=False):
                rows[order[first:last]].tofile(file)
    finally:
        for file in files:
            file.close()


def _add_duplicates(rows: np.ndarray, parts: Sequence[Ids], found: Duplicates) -> None:
    """Count the ids of a bucket that are there again: all rows of an id are in the same one."""
    same = np.flatnonzero(rows["hash"][1:] == rows["hash"][:-1])
    suspects = rows[np.union1d(same, same + 1)]
    ids: list[str] = []
    for part in np.unique(suspects["part"]).tolist():
        here = np.sort(suspects["row"][suspects["part"] == part]).astype(np.int64)
        ids += parts[part].read([ID], here)[ID].to_pylist()
    counts = pd.Series(ids, dtype=object).value_counts(sort=False)
    found.count += int((counts - 1).sum())
    found.ids += sorted(map(str, counts.index[counts > 1]))[: LISTED - len(found.ids)]


def _bucket(scratch: Path, number: int) -> Path:
    return scratch / f"{number:05d}"
