"""Which galaxy is at position p: a pure function of the shards' sizes, the seed and the epoch.

Nothing here knows of ranks, workers or batches. Shards are permuted, and samples are permuted
inside windows of consecutive shards, so that a reader touches a few shards at a time while an
epoch holds every sample exactly once. The order of a run is the concatenation of its epochs.
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

    def __init__(self, shard_samples: Sequence[int], seed: int, window: int) -> None:
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
