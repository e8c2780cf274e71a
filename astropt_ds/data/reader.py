"""Rows of a split to a batch of uint8 patches. A sample that fails keeps its slot."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from astropt_ds.data.decode import BadImageError, decode
from astropt_ds.data.split import Split
from astropt_ds.tokens import Grid, centre_crop

MAX_OPEN_FILES = 64  # a process; a window is smaller as a rule
PADDING = -1  # a row that stands for no image: its weight is zero and it is no fault


class Fault(NamedTuple):
    """A sample that could not be used."""

    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """A micro-batch.

    Attributes:
        patches: (images, tokens, values) uint8, in spiral order; zeros where a sample failed.
        weights: (images,) fp32; 1, or 0 for a sample that failed and for padding.
        rows: (images,) int64, sample numbers in the split; -1 is padding.
        faults: one for each sample that failed.
    """

    patches: Tensor
    weights: Tensor
    rows: Tensor
    faults: list[Fault] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, so that the copy to the GPU overlaps computation."""
        return Batch(self.patches.pin_memory(), self.weights.pin_memory(), self.rows, self.faults)


class Reader:
    """Reads images of a split by row and cuts them into patches.

    Args:
        split: the opened split.
        grid: the geometry images are cropped to and cut by.
        channels: that the model takes.

    Open files are kept, one a shard.
    """

    def __init__(self, split: Split, grid: Grid, channels: int) -> None:
        self.split = split
        self.grid = grid
        self.channels = channels
        self._files: dict[int, int] = {}

    def read(self, rows: np.ndarray, elements: np.ndarray | None = None) -> Batch:
        """A batch of the images in ``rows``.

        Args:
            rows: (images,) sample numbers, or PADDING.
            elements: (images,) the dihedral element of each image; identity if None.
        """
        values = self.grid.patch**2 * self.channels
        patches = torch.zeros(len(rows), self.grid.tokens, values, dtype=torch.uint8)
        weights = torch.zeros(len(rows))
        faults = []
        slots = patches.numpy()
        for slot, row in enumerate(rows):
            if row == PADDING:
                continue
            try:
                image = self._image(int(row))
                if elements is not None:
                    image = dihedral(image, int(elements[slot]))
                slots[slot] = self.grid.to_patches(image)
                weights[slot] = 1.0
            except (BadImageError, OSError) as error:
                faults.append(Fault(*self.split.place(int(row)), str(error)))
        return Batch(patches, weights, torch.from_numpy(np.array(rows, dtype=np.int64)), faults)

    def _image(self, row: int) -> np.ndarray:
        entry = self.split.index[row]
        size, offset = int(entry["size"]), int(entry["offset"])
        data = os.pread(self._file(self.split.shard_of(row)), size, offset)
        if len(data) != size:
            raise BadImageError(f"ends after {len(data)} of {size} bytes")
        if zlib.crc32(data) != int(entry["crc32"]):
            raise BadImageError("its bytes do not match the checksum in the index")
        image = decode(data)
        if image.shape[2] != self.channels:
            raise BadImageError(f"has {image.shape[2]} channels; {self.channels} would be right")
        try:
            return centre_crop(image, self.grid.side)
        except ValueError as error:
            raise BadImageError(str(error)) from None

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:  # close the one opened first
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = self.split.open_shard(shard)
        return self._files[shard]


def dihedral(image: np.ndarray, element: int) -> np.ndarray:
    """One of the eight symmetries of the square, applied to (side, side, channels).

    Elements 0 to 3 are quarter turns, 4 to 7 the same after a left-right flip.
    """
    return np.rot90(image[:, ::-1] if element >= 4 else image, element % 4)
