"""A micro-batch on its way from shared memory to the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from astropt_ds.data.reader import Fault


@dataclass
class Batch:
    """A micro-batch; its memory is valid until the next one is taken from the loader.

    Attributes:
        patches: (images, tokens, values) uint8 or fp32, in spiral order; zeros where a sample
            failed.
        weights: (images,) fp32; 1, or 0 for a sample that failed and for padding.
        rows: (images,) int64, sample numbers in the survey; -1 is padding.
        faults: one for each sample that failed.
        problem: why nothing could be read and the run must stop; all weights are zero then.
    """

    patches: Tensor
    weights: Tensor
    rows: Tensor
    faults: list[Fault] = field(default_factory=list)
    problem: str | None = None
    _copied: torch.cuda.Event | None = None

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Patches and weights on a device; the copy overlaps what the device is doing."""
        patches = self.patches.to(device, non_blocking=True)
        weights = self.weights.to(device, non_blocking=True)
        if device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        return patches, weights

    def release(self) -> None:
        """Wait until the device has its copy: the memory is about to be filled anew."""
        if self._copied is not None:
            self._copied.synchronize()
