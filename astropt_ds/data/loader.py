"""Every rank's share of every global batch, the same galaxies for any ranks and workers.

Step s of a run consumes positions [s * B, (s + 1) * B) of the order, B being the global batch.
The loader keeps no state but that number: resuming at step s is starting to read there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from astropt_ds.config import LARGEST_GPU_MICRO, BatchConfig, Config
from astropt_ds.data.batch import Batch
from astropt_ds.data.order import Mixture, Order, dihedral_element
from astropt_ds.data.pool import Failure, Pool
from astropt_ds.data.reader import PADDING, Fault, Reader, Slots
from astropt_ds.data.survey import Survey
from astropt_ds.tokens import Grid, grid

TRAINING, VALIDATION = "train", "val"


class _Reading:
    """What a worker does with an item. Opens its files where and when it is first asked."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.readers: dict[str, Reader] = {}
        self.ahead = 0  # position up to which shards have been asked for

    def __call__(self, split: str, item: tuple[int, int] | np.ndarray, slot: memoryview) -> Any:
        """Fill a slot from (start, stop) positions, or from sample numbers; returns the faults."""
        if split not in self.readers:
            survey = Survey(self.config, split)
            channels = self.config.model.images.channels
            # a batch may straddle two windows of each source
            files = 2 * self.config.data.window * len(survey.splits)
            self.readers[split] = Reader(survey, _grid(self.config), channels, files)
        reader = self.readers[split]
        rows, elements = item, None
        if isinstance(item, tuple):
            self._read_ahead(item[0])
            rows = self.order.rows(*item)
            if self.config.data.augment == "dihedral":
                elements = np.array([dihedral_element(self.config.seed, p) for p in range(*item)])
        slots = _slots(slot, len(rows), self.config, reader.survey.dtype)
        return reader.read(np.asarray(rows), elements, slots)

    def close(self) -> None:
        while self.readers:
            self.readers.popitem()[1].close()

    def _read_ahead(self, position: int) -> None:
        """Ask for the shards of the next window before this one ends."""
        survey = self.readers[TRAINING].survey
        window = max(1, self.config.data.window * len(survey) // survey.shards)
        if position + window // 2 > self.ahead:
            start = max(position, self.ahead)
            self.ahead = position + window
            survey.read_ahead(self.order.rows(start, self.ahead))

    @cached_property
    def order(self) -> Order | Mixture:
        survey = self.readers[TRAINING].survey
        return survey.order(self.config.seed, self.config.data.window)


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


class Galaxies:
    """The data of a run: training batches and the fixed validation set, for one rank.

    To be made before this process starts threads or joins a process group, then opened.

    Args:
        config: the run's.

    Attributes, once opened:
        hash: of the data, which a resumed run must find unchanged.
        warnings: what is known to be wrong with the data before the run starts.
        grid: the geometry of the images.
        shard_samples: images in each training shard, by the name that faults have.
        steps_an_epoch: whole global batches in the training split.
        validation_images: in the fixed validation set.
        waited: seconds spent waiting for training batches.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.grid = _grid(config)
        self.waited = 0.0
        micro = config.batch.micro or min(LARGEST_GPU_MICRO, config.batch.global_images)
        capacity = _slot_bytes(micro, config, np.dtype(np.float32))
        streams = (TRAINING, VALIDATION)
        self._reading = _Reading(config)
        self._pool = Pool(self._reading, config.data.workers, streams, capacity)

    def open(
        self, rank: int, ranks: int, pin: bool = False, batch: BatchConfig | None = None
    ) -> None:
        """Check the data against the configuration, for this process among the others.

        Args:
            rank: this process.
            ranks: all of them; each looks for its part of the shards.
            pin: batches into page-locked memory, for copies to a GPU that overlap its work.
            batch: the configuration's, if what was to be settled in it has been.

        Raises:
            UserError: no shards, shards that do not fit the configuration, or a global batch that
                cannot be split.
        """
        config = self.config
        self.rank, self.ranks = rank, ranks
        self.micro, self.accumulation = (batch or config.batch).split(ranks)
        train, val = Survey(config, TRAINING), Survey(config, VALIDATION)
        for survey in (train, val):
            survey.check(rank, ranks, config)
        size, bad, patch = self.grid.side, config.data.max_bad_fraction, self.grid.patch
        self.warnings = [w for survey in (train, val) for w in survey.warnings(size, bad, patch)]
        self.hash = train.hash
        self._order = train.order(config.seed, config.data.window)
        self._sources = list(train.splits)
        self.steps_an_epoch = len(train) // config.batch.global_images
        self.shard_samples = train.shard_samples
        self._dtype = train.dtype
        self._validation = val.head(config.eval.images)
        self.validation_images = len(self._validation)
        if pin:
            self._pin()

    def steps(self, start: int, stop: int) -> Iterator[Iterator[Batch]]:
        """The micro-batches of this rank for each step in [start, stop).

        Each is valid until the next is taken, and all of a step are to be taken.
        """
        mine = range(start * self.accumulation, stop * self.accumulation)
        batches = self._batches(TRAINING, _Ranges(mine, self.micro, self.rank, self.ranks))
        for _ in range(start, stop):
            yield islice(batches, self.accumulation)

    def validation(self) -> Iterator[Batch]:
        """This rank's share of the validation set, dealt out in equal numbers of passes.

        Every rank makes as many forward passes as the others; what is left over is padding. The
        rows of its batches count through the validation set.
        """
        images = self.validation_images
        passes = -(-images // (self.micro * self.ranks))
        places = np.full(passes * self.ranks * self.micro, PADDING, dtype=np.int64)
        places[:images] = np.arange(images)
        mine = places.reshape(passes, self.ranks, self.micro)[:, self.rank]
        rows = np.where(mine == PADDING, PADDING, self._validation[mine])
        for batch, place in zip(self._batches(VALIDATION, rows), mine, strict=True):
            batch.rows = torch.from_numpy(place)
            yield batch

    def drawn(self, samples: int) -> dict[str, float]:
        """The fraction that each of several sources has of the samples consumed so far."""
        if not isinstance(self._order, Mixture) or not samples:
            return {}
        counts = self._order.drawn(samples)
        return {s: count / samples for s, count in zip(self._sources, counts, strict=True)}

    def close(self) -> None:
        """End the reading processes, and close what this one opened in their place."""
        self._pool.close()
        self._reading.close()

    def _batches(self, split: str, items: Iterable[Any]) -> Iterator[Batch]:
        results = self._pool.run(split, items)
        while True:
            start = time.monotonic()
            result = next(results, None)
            if split == TRAINING:
                self.waited += time.monotonic() - start
            if result is None:
                return
            batch = self._batch(*result)
            yield batch
            batch.release()

    def _batch(self, slot: memoryview, reply: list[Fault] | Failure) -> Batch:
        slots = _slots(slot, self.micro, self.config, self._dtype)
        patches, weights, rows = map(torch.from_numpy, slots)
        batch = Batch(patches, weights, rows)
        if isinstance(reply, Failure):
            for part in slots:
                part[:] = 0
            batch.problem = reply.message
        else:
            batch.faults = reply
        return batch

    def _pin(self) -> None:
        used = _slot_bytes(self.micro, self.config, self._dtype)
        for stream in (TRAINING, VALIDATION):
            for slot in self._pool.slots(stream):
                address = np.frombuffer(slot, np.uint8).ctypes.data
                error = torch.cuda.cudart().cudaHostRegister(address, used, 0)
                if int(error):  # copies are then slower, not wrong
                    self.warnings.append(f"no page-locked memory for batches (CUDA error {error})")
                    return


def _grid(config: Config) -> Grid:
    return grid(config.data.image_size, config.model.images.patch, str(config.model.orientation))


def _slots(slot: memoryview, images: int, config: Config, dtype: np.dtype) -> Slots:
    """The arrays of a batch in a slot's memory."""
    shape = (images, config.tokens_per_image, config.model.images.input_size)
    rows = np.frombuffer(slot, np.int64, images)
    weights = np.frombuffer(slot, np.float32, images, offset=rows.nbytes)
    start = rows.nbytes + weights.nbytes
    patches = np.frombuffer(slot, dtype, int(np.prod(shape)), offset=start).reshape(shape)
    return Slots(patches, weights, rows)


def _slot_bytes(images: int, config: Config, dtype: np.dtype) -> int:
    values = config.tokens_per_image * config.model.images.input_size
    return images * (8 + 4 + values * dtype.itemsize)
