"""Pictures of what the model predicts: galaxies above, next-patch predictions below."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from astropt_ds.tokens import Grid, destandardise

GAP = 4  # white pixels between pictures


def reconstruction_picture(patches: Tensor, predictions: Tensor, grid: Grid) -> Image.Image:
    """A contact sheet with a column a galaxy.

    A prediction is of a standardised patch: it is shown with the brightness and contrast of the
    patch it stands for. The first patch has no prediction and is shown as it is.

    Args:
        patches: (galaxies, tokens, values) uint8, or fp32 fluxes, which are shown between their
            own 1st and 99.5th percentile.
        predictions: (galaxies, tokens - 1, values), standardised.
        grid: the images' geometry.
    """
    predicted = torch.cat([patches[:, :1], destandardise(predictions, patches[:, 1:])], dim=1)
    low, high = _range(patches)
    rows = []
    for part in (patches, predicted):
        levels = ((part - low) / (high - low)).clamp(0, 1) * 255
        rows.append(_strip(grid.to_images(levels.round().to(torch.uint8)).numpy()))
    gap = np.full((GAP, rows[0].shape[1], 3), 255, dtype=np.uint8)
    return Image.fromarray(np.concatenate([rows[0], gap, rows[1]]))


def _range(patches: Tensor) -> tuple[Tensor, Tensor]:
    """The values shown in black and in white, each (galaxies, 1, 1)."""
    if patches.dtype == torch.uint8:
        return torch.zeros(1), torch.full((1,), 255.0)
    values = patches.flatten(1)
    low, high = (values.quantile(q, dim=1)[:, None, None] for q in (0.01, 0.995))
    return low, torch.maximum(high, low + torch.finfo(torch.float32).tiny)


def _strip(images: np.ndarray) -> np.ndarray:
    """(n, side, side, channels) side by side, the first three channels as red, green and blue."""
    images = images[..., :3]
    if images.shape[-1] < 3:
        images = images[..., :1].repeat(3, axis=-1)
    gap = np.full((images.shape[1], GAP, 3), 255, dtype=np.uint8)
    parts = [part for image in images for part in (image, gap)]
    return np.concatenate(parts[:-1], axis=1)
