"""Every rank's share of every global batch, the same galaxies for any ranks and workers.

Step s of a run consumes positions [s * B, (s + 1) * B) of the order, B being the global batch.
The loader keeps no state but that number: resuming at step s is starting to read there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from astropt_ds.data.order import Order, dihedral_element
from astropt_ds.data.reader import PADDING, Batch, Reader

PREFETCH = 2  # micro-batches a worker keeps ready


class _TrainingBatches(Dataset[Batch]):
    """(start, stop) positions to a batch."""

    def __init__(self, reader: Reader, order: Order, augment: str) -> None:
        self.reader, self.order, self.augment = reader, order, augment

    def __getitem__(self, positions: tuple[int, int]) -> Batch:
        start, stop = positions
        elements = None
        if self.augment == "dihedral":
            elements = np.array([dihedral_element(self.order.seed, p) for p in range(start, stop)])
        return self.reader.read(self.order.rows(start, stop), elements)


class _FixedBatches(Dataset[Batch]):
    """Arrays of rows to batches."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, rows: np.ndarray) -> Batch:
        return self.reader.read(rows)


class Loader:
    """Micro-batches of one rank.

    Args:
        reader: of the training split.
        order: of its samples.
        micro: images in a micro-batch.
        accumulation: micro-batches in a step.
        rank, ranks: this process and how many there are.
        workers: reading processes; 0 reads in this one.
        augment: ``none`` or ``dihedral``.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        *,
        micro: int,
        accumulation: int,
        rank: int,
        ranks: int,
        workers: int,
        augment: str = "none",
    ) -> None:
        self.dataset = _TrainingBatches(reader, order, augment)
        self.micro, self.accumulation = micro, accumulation
        self.rank, self.ranks, self.workers = rank, ranks, workers

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of this rank for each step in [start, stop)."""
        global_images = self.micro * self.accumulation * self.ranks
        ranges = []
        for step in range(start, stop):
            for micro in range(self.accumulation):
                slot = (micro * self.ranks + self.rank) * self.micro
                first = step * global_images + slot
                ranges.append((first, first + self.micro))
        batches = iter(_data_loader(self.dataset, ranges, self.workers))
        for _ in range(start, stop):
            yield [next(batches) for _ in range(self.accumulation)]


def fixed_batches(
    reader: Reader, images: int, *, micro: int, rank: int, ranks: int, workers: int
) -> Iterator[Batch]:
    """The first ``images`` rows of a split, dealt to the ranks in equal numbers of batches.

    Every rank makes as many forward passes as the others; what is left over is padding.
    """
    images = min(images, len(reader.split))
    passes = -(-images // (micro * ranks))
    rows = np.full(passes * ranks * micro, PADDING, dtype=np.int64)
    rows[:images] = np.arange(images)
    mine = list(rows.reshape(passes, ranks, micro)[:, rank])
    yield from _data_loader(_FixedBatches(reader), mine, workers)


def _data_loader(dataset: Dataset[Batch], items: list, workers: int) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_size=None,  # an item is a whole micro-batch
        sampler=items,
        num_workers=min(workers, len(items)),
        prefetch_factor=PREFETCH if min(workers, len(items)) else None,
        pin_memory=torch.cuda.is_available(),
    )
