"""What several benchmarks measure with: random batches, and the ceiling that products set."""

from __future__ import annotations

import torch

from astropt_ds.benchmark.measure import Work
from astropt_ds.config import Config
from astropt_ds.data.batch import Batch


def random_batch(config: Config, images: int) -> Batch:
    """Patches of noise, the same each time, as the loader would hand them over."""
    shape = (images, config.tokens_per_image, config.model.images.input_size)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return Batch(patches, torch.ones(images), torch.arange(images))


def products(rows: int, width: int, gigaflop: float) -> Work:
    """The largest product of a block in its shape, some GFLOP of it; counts GFLOP, not images."""
    a, b = torch.randn(rows, width), torch.randn(width, 4 * width)
    once = 2 * rows * width * 4 * width / 1e9
    times = max(1, round(gigaflop / once))

    def work() -> float:
        for _ in range(times):
            torch.mm(a, b)
        return times * once

    return work
