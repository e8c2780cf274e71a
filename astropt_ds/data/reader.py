"""Samples of a survey to uint8 or float32 patches. A sample that fails keeps its slot."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from astropt_ds.data.decode import BadImageError, decode
from astropt_ds.data.open_shards import OpenShards
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
        self.grid = grid
        self.channels = channels
        self._buffer = np.empty(0, dtype=np.uint8)
        self._shards = OpenShards(open_files)

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
            descriptor = self._shards.descriptor(split, split.shard_of(local))
            try:
                image = self._image(split, local, self._shards.image(split, local, descriptor))
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
        self._shards.close()

    def _image(self, split: Split, row: int, data: bytes) -> np.ndarray:
        entry = split.index[row]
        pixels = int(entry["width"]) * int(entry["height"])
        if self._buffer.size < 3 * pixels:
            self._buffer = np.empty(3 * pixels, dtype=np.uint8)
        image = decode(data, self._buffer)
        check_kind(image, self.channels, self.survey.dtype)
        try:
            image = centre_crop(image, self.grid.side)
        except ValueError as error:
            raise BadImageError(str(error)) from None
        return finite(image, split.store.manifest.nan == "zero")


def check_kind(image: np.ndarray, channels: int, dtype: np.dtype) -> None:
    """See that an image is what its data set says.

    Raises:
        BadImageError: it has other channels, or pixels of another type.
    """
    if image.shape[2] != channels:
        raise BadImageError(f"has {image.shape[2]} channels; {channels} would be right")
    if image.dtype != dtype:
        raise BadImageError(f"holds {image.dtype}; {dtype} would be right")


def finite(image: np.ndarray, zero: bool) -> np.ndarray:
    """An image whose pixels are all finite, those that are not read as zero if they may.

    Raises:
        BadImageError: some are not, and may not.
    """
    if zero:
        return np.nan_to_num(image, nan=0.0, posinf=0.0, neginf=0.0)
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise BadImageError("holds pixels that are not finite")
    return image


def dihedral(image: np.ndarray, element: int) -> np.ndarray:
    """One of the eight symmetries of the square, applied to (side, side, channels).

    Elements 0 to 3 are quarter turns, 4 to 7 the same after a left-right flip.
    """
    return np.rot90(image[:, ::-1] if element >= 4 else image, element % 4)
