"""Fluxes to 8-bit colour.

With I the flux a pixel in units that show a galaxy of mean colour in white, scale * flux, both
stretches use

    f(I) = asinh(Q (I - minimum) / stretch) / asinh(Q / 10) / 10

which is linear for faint pixels and logarithmic for bright ones; 0 is black and 1 is white, and
what a linear stretch would show at a tenth of white is shown so for any Q.
``asinh`` takes it of each band by itself (Lupton, Gunn & Szalay 1999, AJ 118, 1406): bright cores
become white. ``lupton`` takes it of the mean of the three, and keeps their ratios (Lupton et al.
2004, PASP 116, 133, as ``astropy.visualization.make_lupton_rgb``): bright cores keep their colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Stretch:
    """A stretch and its parameters, whose defaults suit g, r and z in nanomaggies a pixel.

    Attributes:
        name: of the formula.
        red, green, blue: the channels to show so.
        scales: of these three.
        minimum: what is black; scaled flux, as the next.
        stretch: where the faint, linear part would be white.
        Q: how strongly what is bright is held back.
    """

    name: Literal["asinh", "lupton"]
    red: int
    green: int
    blue: int
    scales: tuple[float, float, float] = (2.2, 3.4, 6.0)
    minimum: float = -0.022
    stretch: float = 0.29
    Q: float = 5.8

    def __call__(self, fluxes: np.ndarray) -> np.ndarray:
        """Show fluxes, (height, width, channels): (height, width, 3) uint8, red first."""
        scaled = fluxes[..., [self.red, self.green, self.blue]] * np.array(self.scales)
        if self.name == "lupton":
            from astropy.visualization import make_lupton_rgb  # an optional extra

            parameters = {"minimum": self.minimum, "stretch": self.stretch, "Q": self.Q}
            with np.errstate(divide="ignore", invalid="ignore"):  # of black pixels
                image: np.ndarray = make_lupton_rgb(*np.moveaxis(scaled, 2, 0), **parameters)
            return image
        shown = np.arcsinh(self.Q * (scaled - self.minimum) / self.stretch)
        shown *= 0.1 / np.arcsinh(0.1 * self.Q)
        return (shown.clip(0, 1) * 255).astype(np.uint8, order="C")
