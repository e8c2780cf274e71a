"""Samples of a survey to uint8 or float32 patches. A sample that fails keeps its slot."""

from __future__ import annotations

import os
import zlib
from typing import NamedTuple

import numpy as np

from astropt_ds.data.decode import BadImageError, decode
from astropt_ds.data.split import Split
from astropt_ds.data.survey import Survey
from astropt_ds.tokens import Grid, centre_crop

PADDING = -1  # a row that stands for no image: its weight is zero and it is no fault


class Fault(NamedTuple):
    """A sample that could not be used."""

    shard: str
    key: str
    reason: str


class Slots(NamedTuple):
    """Where a batch goes.

    Attributes:
        patches: (images, tokens, values), the survey's dtype, in spiral order.
        weights: (images,) float32; 1, or 0 for a sample that failed and for padding.
        rows: (images,) int64, sample numbers in the survey.
    """

    patches: np.ndarray
    weights: np.ndarray
    rows: np.ndarray


class Reader:
    """Reads images of a survey and cuts them into patches. Files stay open, one a shard.

    Args:
        survey: the opened survey.
        grid: the geometry images are cropped to and cut by.
        channels: that the model takes.
        open_files: that are kept open; those used last.
    """

    def __init__(self, survey: Survey, grid: Grid, channels: int, open_files: int) -> None:
        self.survey = survey
        self.open_files = open_files
        self.grid = grid
        self.channels = channels
        self._buffer = np.empty(0, dtype=np.uint8)
        self._open: dict[str, int] = {}  # shard's file to its descriptor

    def read(self, rows: np.ndarray, elements: np.ndarray | None, slots: Slots) -> list[Fault]:
        """Fill a batch with the images in ``rows``.

        Args:
            rows: (images,) sample numbers, or PADDING.
            elements: (images,) the dihedral element of each image; identity if None.
            slots: where they go.

        Raises:
            UserError: a shard that cannot be used as a whole.
        """
        faults = []
        slots.weights[:] = 0.0
        slots.rows[:] = rows
        for slot, row in enumerate(rows):
            if row == PADDING:
                slots.patches[slot] = 0
                continue
            split, local = self.survey.locate(int(row))
            descriptor = self._descriptor(split, split.shard_of(local))
            try:
                image = self._image(split, local, descriptor)
                if elements is not None:
                    image = dihedral(image, int(elements[slot]))
                self.grid.to_patches(image, out=slots.patches[slot])
                slots.weights[slot] = 1.0
            except (BadImageError, OSError) as error:
                slots.patches[slot] = 0
                faults.append(Fault(*self.survey.place(int(row)), str(error)))
        return faults

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _image(self, split: Split, row: int, descriptor: int) -> np.ndarray:
        entry = split.index[row]
        size, offset = int(entry["size"]), int(entry["offset"])
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise BadImageError(f"ends after {len(data)} of {size} bytes")
        if zlib.crc32(data) != int(entry["crc32"]):
            raise BadImageError("its bytes do not match the checksum in the index")
        pixels = int(entry["width"]) * int(entry["height"])
        if self._buffer.size < 3 * pixels:
            self._buffer = np.empty(3 * pixels, dtype=np.uint8)
        image = decode(data, self._buffer)
        if image.shape[2] != self.channels:
            raise BadImageError(f"has {image.shape[2]} channels; {self.channels} would be right")
        if image.dtype != self.survey.dtype:
            raise BadImageError(f"holds {image.dtype}; {self.survey.dtype} would be right")
        try:
            image = centre_crop(image, self.grid.side)
        except ValueError as error:
            raise BadImageError(str(error)) from None
        if split.store.manifest.nan == "zero":
            return np.nan_to_num(image, nan=0.0, posinf=0.0, neginf=0.0)
        if image.dtype == np.float32 and not np.isfinite(image).all():
            raise BadImageError("holds pixels that are not finite")
        return image

    def _descriptor(self, split: Split, number: int) -> int:
        name = split.store.file(split.entry.shards[number].name)
        descriptor = self._open.pop(name, None)
        if descriptor is None:
            if len(self._open) >= self.open_files:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = split.open_shard(number)
        self._open[name] = descriptor  # at the end: used last
        return descriptor


def dihedral(image: np.ndarray, element: int) -> np.ndarray:
    """One of the eight symmetries of the square, applied to (side, side, channels).

    Elements 0 to 3 are quarter turns, 4 to 7 the same after a left-right flip.
    """
    return np.rot90(image[:, ::-1] if element >= 4 else image, element % 4)
