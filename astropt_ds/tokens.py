"""Images and token sequences: patches in a spiral from the centre, standardised one by one.

A square image of ``side`` pixels is cut into an n x n grid of patches. The spiral starts at the
centre of the grid, so that a galaxy comes first and the sky around it later, and so that the
tokens of a small stamp are the first tokens of a large one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

EPSILON = 1e-8  # keeps a constant patch finite; vanishes in fp16, hence fp32 throughout


@lru_cache(maxsize=64)
def spiral(n: int) -> np.ndarray:
    """Raster indices of an n x n grid in spiral order, centre first; shape (n * n,), int64.

    The grid is walked clockwise inward from its top-left corner, and the walk is reversed. Even
    and odd grids are both fine; grids of the same parity are nested.
    """
    if n < 1:
        raise ValueError(f"a grid of {n} x {n} patches is empty")
    raster = np.arange(n * n).reshape(n, n)
    walk = []
    while raster.size:
        walk.append(raster[0])
        # drop the row just walked, then turn the rest so that the next side is its first row
        raster = np.rot90(raster[1:])
    order = np.concatenate(walk)[::-1].copy()
    order.flags.writeable = False  # cached and shared
    return order


@dataclass(frozen=True)
class Grid:
    """The geometry of one image size. Made by :func:`grid`, which keeps one per size.

    Attributes:
        side: pixels along an image, a multiple of ``patch``.
        patch: pixels along a patch.
        orientation: ``rows`` (AstroPT v1) or ``columns`` (v2, v3: the image transposed first).
    """

    side: int
    patch: int
    orientation: str

    @property
    def n(self) -> int:
        """Patches along an image."""
        return self.side // self.patch

    @property
    def tokens(self) -> int:
        """Patches in an image."""
        return self.n * self.n

    @cached_property
    def lines(self) -> np.ndarray:
        """Where each line of each token lies; shape (tokens * patch,), int64.

        An image seen as rows of ``patch`` pixels has side * n of them; line ``dy`` of token ``t``
        is row ``lines[t * patch + dy]``. One gather then cuts and orders the whole image.
        """
        row, column = np.divmod(spiral(self.n), self.n)
        first = row * self.patch * self.n + column
        return (first[:, None] + np.arange(self.patch) * self.n).reshape(-1)

    @cached_property
    def inverse_lines(self) -> np.ndarray:
        """The inverse permutation of :attr:`lines`."""
        return np.argsort(self.lines)

    def to_patches(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Cut one image into patches, channel fastest.

        Args:
            image: (side, side, channels), any dtype.
            out: where they go, contiguous; a new array if None. What has room for fewer gets the
                first ones.

        Returns:
            (tokens, patch * patch * channels), the same dtype, in spiral order.
        """
        image = np.ascontiguousarray(image)
        values = self.patch**2 * image.shape[2]
        if self.orientation == "columns":
            # whole pixels as one item each: half the time of transposing their channels apart
            pixels = image.view(f"V{image.shape[2] * image.itemsize}")[..., 0]
            image = np.ascontiguousarray(pixels.T).view(image.dtype)
        rows = image.reshape(self.side * self.n, -1)
        if out is None:
            out = np.empty((self.tokens, values), image.dtype)
        lines = self.lines[: len(out) * self.patch]
        # clip: the lines are known to lie within, and numpy would else copy through a buffer
        np.take(rows, lines, axis=0, out=out.reshape(len(lines), -1), mode="clip")
        return out

    def cut(self, images: Tensor) -> Tensor:
        """Cut a batch of images into patches, on the device they are on: :meth:`to_patches`.

        Args:
            images: (batch, side, side, channels), any dtype.

        Returns:
            (batch, tokens, patch * patch * channels), the same dtype, in spiral order.
        """
        if self.orientation == "columns":
            images = images.transpose(1, 2)
        rows = images.reshape(len(images), self.side * self.n, -1)
        index = torch.from_numpy(self.lines).to(images.device)
        return rows[:, index].reshape(len(images), self.tokens, -1)

    def to_images(self, patches: Tensor) -> Tensor:
        """The inverse of :meth:`to_patches` for a batch.

        Args:
            patches: (batch, tokens, patch * patch * channels).

        Returns:
            (batch, side, side, channels).
        """
        batch = patches.shape[0]
        rows = patches.reshape(batch, self.side * self.n, -1)
        index = torch.from_numpy(self.inverse_lines).to(patches.device)
        images = rows[:, index].reshape(batch, self.side, self.side, -1)
        return images.transpose(1, 2) if self.orientation == "columns" else images


@lru_cache(maxsize=64)
def grid(side: int, patch: int, orientation: str) -> Grid:
    """The grid of one image size; its index tables are computed once.

    Raises:
        ValueError: the side is no multiple of the patch, or the orientation is unknown.
    """
    if side < patch or side % patch:
        raise ValueError(f"an image of {side} pixels is no whole number of {patch}-pixel patches")
    if orientation not in ("rows", "columns"):
        raise ValueError(f"orientation {orientation!r}: 'rows' or 'columns' would be right")
    return Grid(side, patch, orientation)


def prefix_grid(whole: Grid, tokens: int) -> Grid:
    """The smallest grid that begins with the same tokens: the central part of the same image.

    Args:
        whole: of an image.
        tokens: from the centre on, no more than it has.
    """
    n = math.isqrt(tokens - 1) + 1
    n += (whole.n - n) % 2  # grids of the same parity are nested
    return grid(n * whole.patch, whole.patch, whole.orientation)


def centre_crop(image: np.ndarray, side: int) -> np.ndarray:
    """The central ``side x side`` pixels of an image of shape (height, width, channels).

    An odd margin leaves its extra pixel at the bottom and the right.

    Raises:
        ValueError: the image is smaller than that.
    """
    height, width = image.shape[:2]
    if min(height, width) < side:
        raise ValueError(f"is {width} x {height} pixels, smaller than {side} x {side}")
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def standardise(patches: Tensor) -> Tensor:
    """Standardise each patch over its own values, in fp32, on the device it is on.

    (x - mean) / (std + 1e-8) with the unbiased std (AstroPT, arXiv 2405.14930, section 3); a
    constant patch gives zeros.

    Args:
        patches: (..., values), uint8 or floating point.

    Returns:
        The same shape, fp32.
    """
    x = patches.float()
    centred = x - x.mean(dim=-1, keepdim=True)
    tokens = centred / (x.std(dim=-1, keepdim=True) + EPSILON)
    # A mean is rounded: without this, a constant patch can come out as noise of order one.
    constant = x.amin(dim=-1, keepdim=True) == x.amax(dim=-1, keepdim=True)
    return tokens.masked_fill(constant, 0.0)


def destandardise(tokens: Tensor, patches: Tensor) -> Tensor:
    """Give tokens the brightness and contrast of the patches they stand for.

    Args:
        tokens: (..., values), standardised.
        patches: the same shape, the original values, whose mean and std are used.

    Returns:
        The same shape, fp32, in the units of ``patches``.
    """
    x = patches.float()
    return tokens.float() * x.std(dim=-1, keepdim=True) + x.mean(dim=-1, keepdim=True)
