"""A split of a data set, opened for reading by row."""

from __future__ import annotations

import os
import zlib

import numpy as np

from astropt_ds.data.manifest import MANIFEST
from astropt_ds.data.store import Store
from astropt_ds.errors import UserError


class Split:
    """One split of a data set.

    Args:
        store: where the data set's files are.
        name: the split.

    Attributes:
        index: (samples,) structured array of :func:`manifest.index_dtype`, memory-mapped.
        first: (shards + 1,), the row at which each shard starts.

    Raises:
        UserError: the split is not there or empty, or its index is not the manifest's.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        splits = store.manifest.splits
        if name not in splits or not splits[name].samples:
            known = {n: s.samples for n, s in splits.items()}
            raise UserError(f"{store}: no samples in split {name!r}; it holds {known}")
        self.entry = splits[name]
        path = store.file(self.entry.index)
        descriptor = store.open_index(self.entry)
        try:  # by its descriptor: a cached file may be gone from its folder already
            self.index = np.load(f"/dev/fd/{descriptor}", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable index ({error})") from None
        finally:
            os.close(descriptor)
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

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds a row."""
        return int(np.searchsorted(self.first, row, side="right")) - 1

    def place(self, row: int) -> tuple[str, str]:
        """(shard, key) of a row, for messages."""
        name = self.entry.shards[self.shard_of(row)].name
        return name, self.index[row]["key"].decode(errors="replace")

    def open_shard(self, number: int) -> int:
        """A file descriptor of a shard, fetched first where it is remote.

        Raises:
            UserError: it is missing, unreachable or of another size, or its part of the index
                is not the manifest's.
        """
        shard = self.entry.shards[number]
        rows = self.index[self.first[number] : self.first[number + 1]]
        if zlib.crc32(rows.tobytes()) != shard.index_crc32:
            raise UserError(
                f"{self.store.file(self.entry.index)}: the rows of {shard.name} do not match "
                f"their checksum in {MANIFEST}"
            )
        try:
            descriptor = self.store.open_shard(shard)
        except OSError as error:
            raise UserError(f"{self.store.file(shard.name)}: {error.strerror}") from None
        if (size := os.fstat(descriptor).st_size) != shard.bytes:
            os.close(descriptor)
            raise UserError(
                f"{self.store.file(shard.name)}: {size} bytes; the manifest says {shard.bytes}"
            )
        return descriptor

    def smaller_than(self, side: int) -> int:
        """How many images are smaller than ``side`` along either axis.

        The manifest tells which shards have any; only their part of the index is looked at.
        """
        return sum(
            int(((rows["width"] < side) | (rows["height"] < side)).sum())
            for rows in self._rows_of_shards_below(side)
        )

    @property
    def smallest(self) -> int:
        """Pixels along the shortest side of any image."""
        return min(shard.smallest for shard in self.entry.shards if shard.samples)

    def _rows_of_shards_below(self, side: int) -> list[np.ndarray]:
        return [
            self.index[first : first + shard.samples]
            for first, shard in zip(self.first, self.entry.shards, strict=False)
            if shard.samples and shard.smallest < side
        ]
