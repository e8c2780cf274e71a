"""How a model sees an image: as its central patches, as many as an embedding needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from astropt_ds.data.centre import decode_centre
from astropt_ds.data.decode import NPY_MAGIC, BadImageError, decode
from astropt_ds.data.reader import check_kind, finite
from astropt_ds.tokens import Grid, centre_crop, prefix_grid


@dataclass(frozen=True)
class View:
    """What is taken of each image.

    Attributes:
        whole: the geometry of all tokens that the model could read: images must be as large.
        tokens: that are taken, from the centre on.
        channels: of the images.
        dtype: of their pixels: uint8, or float32 for fluxes.
        strict: decode all JPEG files to their end, as if all pixels were wanted.
    """

    whole: Grid
    tokens: int
    channels: int
    dtype: str
    strict: bool = False

    @cached_property
    def grid(self) -> Grid:
        """The geometry of the pixels that are taken."""
        return prefix_grid(self.whole, self.tokens)

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, values) of an image."""
        return self.tokens, self.whole.patch**2 * self.channels

    @property
    def image_bytes(self) -> int:
        """Of the patches of an image."""
        return self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize

    @cached_property
    def _buffer(self) -> np.ndarray:
        """For the decoder; of larger images than most, and never touched beyond what is used."""
        return np.empty(3 * (2 * self.whole.side) ** 2, np.uint8)

    def of_file(
        self, data: bytes, out: np.ndarray, zero: bool = False, verified: bool = False
    ) -> None:
        """The patches of an image file.

        Args:
            data: what the file holds.
            out: (tokens, values), where they go.
            zero: read pixels that are not finite as zero.
            verified: the bytes are known to be whole, so that looking at the centre alone, which is
                faster, misses no damage.

        Raises:
            BadImageError: it cannot be used, or is smaller than the model wants.
        """
        if data.startswith(NPY_MAGIC):
            self.of_pixels(decode(data), out, zero)
            return
        strict = self.strict or not verified
        image = decode_centre(data, self.grid.side, self.whole.side, strict, self._buffer)
        check_kind(image, self.channels, np.dtype(self.dtype))
        self.grid.to_patches(image, out)

    def of_pixels(self, image: np.ndarray, out: np.ndarray, zero: bool = False) -> None:
        """The patches of an image, (height, width, channels); as :meth:`of_file` has them."""
        check_kind(image, self.channels, np.dtype(self.dtype))
        try:
            image = finite(centre_crop(image, self.whole.side), zero)
        except ValueError as error:
            raise BadImageError(str(error)) from None
        self.grid.to_patches(centre_crop(image, self.grid.side), out)
