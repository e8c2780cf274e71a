"""Every rank's share of every global batch, the same galaxies for any ranks and workers.

Step s of a run consumes positions [s * B, (s + 1) * B) of the order, B being the global batch.
The loader keeps no state but that number: resuming at step s is starting to read there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from astropt_ds.config import Config
from astropt_ds.data.order import Order, dihedral_element
from astropt_ds.data.reader import PADDING, Batch, Reader
from astropt_ds.data.split import Split
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError
from astropt_ds.tokens import Grid, grid

PREFETCH = 2  # micro-batches a worker keeps ready
NOTHING = Batch(torch.empty(0), torch.empty(0), torch.empty(0))  # the answer to None


class _TrainingBatches(Dataset[Batch]):
    """(start, stop) positions to a batch. Opens its files where and when it is first asked."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def reader(self) -> Reader:
        return _reader(self.config, "train")

    @cached_property
    def order(self) -> Order:
        sizes = self.reader.split.shard_samples
        return Order(sizes, self.config.seed, self.config.data.window)

    def __getitem__(self, positions: tuple[int, int] | None) -> Batch:
        if positions is None:
            return NOTHING
        elements = None
        if self.config.data.augment == "dihedral":
            drawn = [dihedral_element(self.config.seed, p) for p in range(*positions)]
            elements = np.array(drawn)
        return self.reader.read(self.order.rows(*positions), elements)


class _ValidationBatches(Dataset[Batch]):
    """Arrays of rows to batches. Opens its files where and when it is first asked."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def reader(self) -> Reader:
        return _reader(self.config, "val")

    def __getitem__(self, rows: np.ndarray | None) -> Batch:
        return NOTHING if rows is None else self.reader.read(rows)


@dataclass(frozen=True)
class _Ranges:
    """The positions of this rank's micro-batches, made one by one: a run has millions of them.

    The n-th micro-batches of all ranks lie side by side, and those of a step make a global batch.
    """

    numbers: range
    micro: int
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in self.numbers:
            first = (number * self.ranks + self.rank) * self.micro
            yield first, first + self.micro


class _Items:
    """What the processes are to read next; apart from _Workers, lest the two hold each other."""

    items: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class _Workers:
    """Processes that turn items into batches, in order; started once, at construction.

    They are forked, and a fork among other threads (gloo's, a progress bar's) can leave the child
    waiting for a lock that its owner will never give back: so before there are any.
    """

    def __init__(self, dataset: Dataset[Batch], workers: int, pin: bool) -> None:
        self._workers = workers
        self._items = _Items()
        self._loader = DataLoader(
            dataset,
            batch_size=None,  # an item is a whole micro-batch
            sampler=self._items,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context="fork" if workers else None,
            pin_memory=pin,
        )
        if workers:
            iter(self._loader)  # of no items yet: it only starts the processes

    def wake(self) -> None:
        """Have every process answer once: those never asked take seconds to stop at the end."""
        for _ in self.batches([None] * self._workers):
            pass

    def batches(self, items: Iterable[Any]) -> Iterator[Batch]:
        """The batches of these items; one such iteration at a time."""
        self._items.items = items
        return iter(self._loader)


class Galaxies:
    """The data of a run: training batches and the fixed validation set, for one rank.

    To be made before this process starts threads or joins a process group, then opened.

    Args:
        config: the run's.
        pin: training batches into page-locked memory, for a GPU.

    Attributes, once opened:
        hash: of the training split, which a resumed run must find unchanged.
        warnings: what is known to be wrong with the data before the run starts.
        grid: the geometry of the images.
        validation_images: in the fixed validation set.
    """

    def __init__(self, config: Config, pin: bool) -> None:
        self.config = config
        workers = config.data.workers
        # pinning and asking take threads: all processes are started first
        self._validation = _Workers(_ValidationBatches(config), workers, pin=False)
        self._training = _Workers(_TrainingBatches(config), workers, pin)
        self._validation.wake()
        self._training.wake()

    def open(self, rank: int, ranks: int) -> None:
        """Check the data against the configuration, for this process among the others.

        Raises:
            UserError: no shards, shards that do not fit the configuration, or a global batch that
                cannot be split.
        """
        config = self.config
        self.rank, self.ranks = rank, ranks
        self.micro, self.accumulation = config.batch.split(ranks)
        if not config.data.path:
            raise UserError("data.path is missing: the folder that tools/make_shards.py wrote")
        store = Folder(Path(config.data.path))
        train, val = Split(store, "train"), Split(store, "val")
        for split in (train, val):
            store.check(split.entry, slice(rank, None, ranks))
        channels = config.model.images.channels
        if store.manifest.channels != channels:
            raise UserError(
                f"data.path={config.data.path}: images of {store.manifest.channels} channels; "
                f"model.modalities.images.channels={channels} needs others"
            )
        self.warnings = [w for split in (train, val) if (w := _too_small(split, config))]
        self.validation_images = min(config.eval.images, len(val))
        self.hash = store.manifest.hash(("train", "val"))
        self.grid = _grid(config)

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of this rank for each step in [start, stop)."""
        mine = range(start * self.accumulation, stop * self.accumulation)
        batches = self._training.batches(_Ranges(mine, self.micro, self.rank, self.ranks))
        for _ in range(start, stop):
            yield [next(batches) for _ in range(self.accumulation)]

    def validation(self) -> Iterator[Batch]:
        """This rank's share of the validation set: its first images, dealt out in equal numbers.

        Every rank makes as many forward passes as the others; what is left over is padding.
        """
        images = self.validation_images
        passes = -(-images // (self.micro * self.ranks))
        rows = np.full(passes * self.ranks * self.micro, PADDING, dtype=np.int64)
        rows[:images] = np.arange(images)
        return self._validation.batches(rows.reshape(passes, self.ranks, self.micro)[:, self.rank])


def _grid(config: Config) -> Grid:
    return grid(config.data.image_size, config.model.images.patch, str(config.model.orientation))


def _reader(config: Config, split: str) -> Reader:
    channels = config.model.images.channels
    return Reader(Split(Folder(Path(str(config.data.path))), split), _grid(config), channels)


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
        patch = config.model.images.patch
        raise UserError(
            f"{message}, more than data.max_bad_fraction={config.data.max_bad_fraction}; "
            f"all have {split.smallest // patch * patch} pixels"
        )
    return f"{message}; their slots get weight zero"
