"""The data of a run: one split of one data set, or of several that are mixed."""

from __future__ import annotations

import hashlib

import numpy as np

from astropt_ds.config import Config
from astropt_ds.data.order import Mixture, Order
from astropt_ds.data.remote import open_store
from astropt_ds.data.split import Split
from astropt_ds.errors import UserError


class Survey:
    """A split of every source; sample numbers count through the sources in their order.

    Args:
        config: the run's; ``data.path`` or ``data.sources`` say where the shards are.
        name: the split.

    Attributes:
        splits: each source's.
        first: (sources + 1,), the number at which each source's samples start.

    Raises:
        UserError: no source, one that is not there, or sources that do not fit the model or each
            other.
    """

    def __init__(self, config: Config, name: str) -> None:
        self.name = name
        self.sources = config.data.located()
        self.splits = {
            source: Split(open_store(where.path, config.data), name)
            for source, where in self.sources.items()
        }
        self.first = np.concatenate([[0], np.cumsum([len(s) for s in self.splits.values()])])
        channels = config.model.images.channels
        for split in self.splits.values():
            if split.store.manifest.channels != channels:
                raise UserError(
                    f"{split.store}: images of {split.store.manifest.channels} channels "
                    f"({', '.join(split.store.manifest.bands)}); "
                    f"model.modalities.images.channels={channels} needs others"
                )
        kinds = {str(split.store): split.store.manifest.dtype for split in self.splits.values()}
        if len(set(kinds.values())) > 1:
            raise UserError(f"data.sources: pixels of several kinds cannot be mixed: {kinds}")

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def shards(self) -> int:
        """Shards of all sources together."""
        return sum(len(split.entry.shards) for split in self.splits.values())

    @property
    def dtype(self) -> np.dtype:
        """Of the pixels."""
        return np.dtype(next(iter(self.splits.values())).store.manifest.dtype)

    @property
    def hash(self) -> str:
        """Changes when an image, a source or a weight does."""
        facts = [
            (source, self.sources[source].weight, split.store.manifest.hash(("train", "val")))
            for source, split in self.splits.items()
        ]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def order(self, seed: int, window: int) -> Order | Mixture:
        """The sequence of sample numbers in which a run reads this survey."""
        if len(self.splits) == 1:
            return Order(next(iter(self.splits.values())).shard_samples, seed, window)
        orders = [
            Order(split.shard_samples, f"{seed}/{source}", window)
            for source, split in self.splits.items()
        ]
        return Mixture(orders, [source.weight for source in self.sources.values()], seed)

    def read_ahead(self, rows: np.ndarray) -> None:
        """Have the shards of these samples at hand soon; most wanted first."""
        for first, last, split in zip(
            self.first[:-1], self.first[1:], self.splits.values(), strict=True
        ):
            mine = rows[(rows >= first) & (rows < last)] - first
            shards = np.searchsorted(split.first, mine, side="right") - 1
            split.store.read_ahead(split.entry.shards[s] for s in dict.fromkeys(shards.tolist()))

    def locate(self, row: int) -> tuple[Split, int]:
        """The split that holds a sample, and its row there."""
        number = int(np.searchsorted(self.first, row, side="right")) - 1
        return list(self.splits.values())[number], row - int(self.first[number])

    def place(self, row: int) -> tuple[str, str]:
        """(shard, key) of a sample, for messages; of several sources, the shard's is named, too."""
        split, local = self.locate(row)
        shard, key = split.place(local)
        return self._label(split, shard), key

    @property
    def shard_samples(self) -> dict[str, int]:
        """Samples in each shard, by the names that :meth:`place` gives."""
        return {
            self._label(split, shard.name): shard.samples
            for split in self.splits.values()
            for shard in split.entry.shards
        }

    def _label(self, split: Split, shard: str) -> str:
        if len(self.splits) == 1:
            return shard
        return f"{next(name for name, s in self.splits.items() if s is split)}/{shard}"

    def head(self, images: int) -> np.ndarray:
        """Sample numbers of a fixed part: each source's first, in proportion to its weight.

        As many as asked for where there are so many, but one of each source at least.
        """
        weights = np.array([source.weight for source in self.sources.values()])
        ends = np.round(images * np.cumsum(weights) / weights.sum()).astype(int)
        shares = np.maximum(np.diff(ends, prepend=0), 1)
        return np.concatenate(
            [
                first + np.arange(min(share, len(split)))
                for first, share, split in zip(
                    self.first, shares, self.splits.values(), strict=False
                )
            ]
        )

    def check(self, rank: int, ranks: int, config: Config) -> None:
        """Look for this rank's part of the shards, and at the cache that remote ones need.

        Raises:
            UserError: a shard is missing or surplus, or the cache too small.
        """
        for split in self.splits.values():
            split.store.check(split.entry, slice(rank, None, ranks))
        window, limit = config.data.window, config.data.cache_gb
        needed = sum(s.store.cached_bytes(s.entry, window) for s in self.splits.values())
        if needed > limit * 1e9:
            raise UserError(
                f"data.cache_gb={limit:g}: two windows of data.window={window} shards of each "
                f"source need {needed / 1e9:.3g}; that, or a smaller window, would be right"
            )

    def warnings(self, size: int, max_bad_fraction: float, patch: int) -> list[str]:
        """What is known to be wrong with the images before they are read.

        Args:
            size: pixels that stamps are cropped to.
            max_bad_fraction: of the images that a run puts up with.
            patch: pixels along a patch.

        Raises:
            UserError: more images than that are too small.
        """
        found = []
        for split in self.splits.values():
            if small := split.smaller_than(size):
                message = (
                    f"{small} of {len(split)} images in split {self.name!r} of {split.store} are "
                    f"smaller than data.image_size={size}"
                )
                if small > max_bad_fraction * len(split):
                    raise UserError(
                        f"{message}, more than data.max_bad_fraction={max_bad_fraction}; "
                        f"all have at least {split.smallest // patch * patch} pixels"
                    )
                found.append(f"{message}; their slots get weight zero")
        bands = {str(split.store): split.store.manifest.bands for split in self.splits.values()}
        if len({tuple(names) for names in bands.values()}) > 1:
            found.append(f"the sources' channels are different bands: {bands}")
        return found
