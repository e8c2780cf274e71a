"""Which galaxy is at position p: a pure function of the shards' sizes, the seed and the epoch.

Nothing here knows of ranks, workers or batches. Shards are permuted, and samples are permuted
inside windows of consecutive shards, so that a reader touches a few shards at a time while an
epoch holds every sample exactly once. The order of a run is the concatenation of its epochs.
Several sources are mixed by weight; an epoch is then each source's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def keyed_permutation(n: int, *key: object) -> np.ndarray:
    """A permutation of range(n) that depends on ``key`` alone; shape (n,), int64.

    Sorting the raw output of Philox (Salmon et al. 2011) rather than ``Generator.permutation``:
    numpy promises the former's stream for all its versions, and a resume may meet another one.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(bits, kind="stable")


def dihedral_element(seed: int, position: int) -> int:
    """Which of the eight flips and rotations (0 to 7) the image at a position gets."""
    return hashlib.sha256(f"dihedral/{seed}/{position}".encode()).digest()[0] % 8


@dataclass(frozen=True)
class _Epoch:
    shards: np.ndarray  # permuted shard numbers
    starts: np.ndarray  # first position of each window within the epoch, then the epoch's length


class Order:
    """The infinite sequence of sample numbers.

    Args:
        shard_samples: samples in each shard; empty shards are fine.
        seed: of the order.
        window: shards whose samples are mixed.

    Sample numbers count through the shards in their given order: shard i starts at the sum of
    those before it.

    Raises:
        ValueError: there is no sample at all.
    """

    def __init__(self, shard_samples: Sequence[int], seed: int | str, window: int) -> None:
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        self.samples = int(self.first[-1])
        self.seed = seed
        self.window = window
        if self.samples == 0:
            raise ValueError("there are no samples to order")
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Sample numbers at positions [start, stop); shape (stop - start,), int64.

        A range may straddle windows and epochs.
        """
        parts = []
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.samples)
            starts = self._epoch(epoch).starts
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            rows = self._window(epoch, window)[offset - starts[window] :][: stop - position]
            parts.append(rows)
            position += len(rows)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = keyed_permutation(len(self.sizes), "shards", self.seed, epoch)
            ends = np.cumsum(self.sizes[shards])
            bounds = np.append(np.arange(self.window, len(shards), self.window), len(shards))
            plan = _Epoch(shards, np.concatenate([[0], ends[bounds - 1]]))
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: plan}
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        key = (epoch, window)
        if key not in self._windows:
            shards = self._epoch(epoch).shards[window * self.window : (window + 1) * self.window]
            rows = np.concatenate([np.arange(self.first[s], self.first[s + 1]) for s in shards])
            mixed = rows[keyed_permutation(len(rows), "window", self.seed, epoch, window)]
            # a batch touches two windows at most in practice; keep a few, not an epoch of them
            self._windows = {**dict(list(self._windows.items())[-3:]), key: mixed}
        return self._windows[key]


BLOCK = 4096  # positions among which every source has its exact share


class Mixture:
    """Several sources in one infinite sequence, mixed by weight; each has epochs of its own.

    Positions fall into blocks. In every block each source has the same number of slots, its
    weight's share of 4096 by largest remainders and one at least, and a permutation says which.

    Args:
        orders: one a source. Sample numbers count through the sources in this order.
        weights: positive, one a source; their ratios count.
        seed: of the mixing.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self.orders = orders
        self.seed = seed
        self.slots = _shares(np.asarray(weights, dtype=float))
        self.first = np.concatenate([[0], np.cumsum([order.samples for order in orders])])
        self._blocks: dict[int, np.ndarray] = {}

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Sample numbers at positions [start, stop); shape (stop - start,), int64."""
        parts = []
        position = start
        while position < stop:
            block, offset = divmod(position, BLOCK)
            sources = self._block(block)[offset:][: stop - position]
            rows = np.empty(len(sources), np.int64)
            for number, (order, before) in enumerate(
                zip(self.orders, self.drawn(position), strict=True)
            ):
                mine = sources == number
                rows[mine] = self.first[number] + order.rows(before, before + int(mine.sum()))
            parts.append(rows)
            position += len(rows)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def drawn(self, position: int) -> list[int]:
        """How many samples of each source lie before a position."""
        block, offset = divmod(position, BLOCK)
        here = np.bincount(self._block(block)[:offset], minlength=len(self.slots))
        return (block * self.slots + here).tolist()

    def _block(self, block: int) -> np.ndarray:
        """The source of each slot; shape (BLOCK,)."""
        if block not in self._blocks:
            sources = np.repeat(np.arange(len(self.slots)), self.slots)
            mixed = sources[keyed_permutation(BLOCK, "mixture", self.seed, block)]
            self._blocks = {**dict(list(self._blocks.items())[-1:]), block: mixed}
        return self._blocks[block]


def _shares(weights: np.ndarray) -> np.ndarray:
    """Slots of a block for each source; they sum to BLOCK."""
    exact = weights / weights.sum() * (BLOCK - len(weights))
    slots = np.floor(exact).astype(np.int64)
    rest = BLOCK - len(weights) - int(slots.sum())
    slots[np.argsort(slots - exact, kind="stable")[:rest]] += 1
    return slots + 1
