"""Every rank's share of every global batch, the same galaxies for any ranks and workers.

Step s of a run consumes positions [s * B, (s + 1) * B) of the order, B being the global batch.
The loader keeps no state but that number: resuming at step s is starting to read there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from astropt_ds.config import Config
from astropt_ds.data.order import Order, dihedral_element
from astropt_ds.data.reader import PADDING, Batch, Reader
from astropt_ds.data.shards import Split
from astropt_ds.errors import UserError
from astropt_ds.tokens import grid

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


@dataclass(frozen=True)
class _Ranges:
    """The positions of this rank's micro-batches, made one by one: a run has millions of them.

    The n-th micro-batches of all ranks lie side by side, and those of a step make a global batch.
    """

    numbers: range
    micro: int
    rank: int
    ranks: int

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in self.numbers:
            first = (number * self.ranks + self.rank) * self.micro
            yield first, first + self.micro


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
        pin: batches into page-locked memory, for a GPU.
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
        augment: str,
        pin: bool,
    ) -> None:
        self.dataset = _TrainingBatches(reader, order, augment)
        self.micro, self.accumulation = micro, accumulation
        self.rank, self.ranks, self.workers = rank, ranks, workers
        self.pin = pin

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of this rank for each step in [start, stop)."""
        mine = range(start * self.accumulation, stop * self.accumulation)
        ranges = _Ranges(mine, self.micro, self.rank, self.ranks)
        batches = iter(_data_loader(self.dataset, ranges, self.workers, self.pin))
        for _ in range(start, stop):
            yield [next(batches) for _ in range(self.accumulation)]


class Galaxies:
    """The data of a run: training batches and the fixed validation set, for one rank.

    Args:
        config: the run's.
        rank, ranks: this process and how many there are.
        pin: batches into page-locked memory, for a GPU.

    Attributes:
        hash: of the training split, which a resumed run must find unchanged.
        warnings: what is known to be wrong with the data before the run starts.
        grid: the geometry of the images.
        training: this rank's training batches.
        validation_images: in the fixed validation set.

    Raises:
        UserError: no shards, or shards that do not fit the configuration.
    """

    def __init__(self, config: Config, rank: int, ranks: int, pin: bool) -> None:
        if config.data.path is None:
            raise UserError("data.path is missing: the folder that tools/make_shards.py wrote")
        channels = config.model.images.channels
        size, patch = config.data.image_size, config.model.images.patch
        self.grid = grid(size, patch, str(config.model.orientation))
        self.rank, self.ranks, self.workers, self.pin = rank, ranks, config.data.workers, pin
        self.micro, accumulation = config.batch.split(ranks)
        train, val = Split(config.data.path, "train"), Split(config.data.path, "val")
        if train.manifest.channels != channels:
            raise UserError(
                f"data.path={config.data.path}: images of {train.manifest.channels} channels; "
                f"model.modalities.images.channels={channels} needs others"
            )
        self.warnings = [w for split in (train, val) if (w := _too_small(split, config))]
        self.validation_images = min(config.eval.images, len(val))
        self.hash = train.hash
        self.validation = Reader(val, self.grid, channels)
        self.training = Loader(
            Reader(train, self.grid, channels),
            Order(train.shard_samples, config.seed, config.data.window),
            micro=self.micro,
            accumulation=accumulation,
            rank=rank,
            ranks=ranks,
            workers=config.data.workers,
            augment=config.data.augment,
            pin=pin,
        )

    def fixed(self) -> Iterator[Batch]:
        """This rank's share of the validation set: its first images, dealt out in equal numbers.

        Every rank makes as many forward passes as the others; what is left over is padding.
        """
        images = self.validation_images
        passes = -(-images // (self.micro * self.ranks))
        rows = np.full(passes * self.ranks * self.micro, PADDING, dtype=np.int64)
        rows[:images] = np.arange(images)
        mine = list(rows.reshape(passes, self.ranks, self.micro)[:, self.rank])
        yield from _data_loader(_FixedBatches(self.validation), mine, self.workers, self.pin)


def _too_small(split: Split, config: Config) -> str | None:
    """A warning about images smaller than the declared size.

    Raises:
        UserError: they are more than the run would put up with.
    """
    size = config.data.image_size
    small = split.smaller_than(size)
    if not small:
        return None
    message = (
        f"{small} of {len(split)} images in split {split.name!r} are smaller than "
        f"data.image_size={size}"
    )
    if small > config.data.max_bad_fraction * len(split):
        largest = int(np.minimum(split.index["width"], split.index["height"]).min())
        patch = config.model.images.patch
        raise UserError(
            f"{message}, more than data.max_bad_fraction={config.data.max_bad_fraction}; "
            f"all have {largest // patch * patch} pixels"
        )
    return f"{message}; their slots get weight zero"


def _data_loader(dataset: Dataset[Batch], items: Any, workers: int, pin: bool) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_size=None,  # an item is a whole micro-batch
        sampler=items,
        num_workers=min(workers, len(items)),
        prefetch_factor=PREFETCH if min(workers, len(items)) else None,
        pin_memory=pin,
    )
