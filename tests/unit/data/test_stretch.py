import math

import numpy as np
import pytest

from astropt_ds.data.stretch import Stretch


def shown(name, *flux, **parameters):
    """A pixel of red, green and blue flux, as it is shown."""
    defaults = {"scales": (1.0, 1.0, 1.0), "minimum": 0.0}
    stretch = Stretch(name, 0, 1, 2, **{**defaults, **parameters})
    return stretch(np.full((2, 2, 3), flux, np.float32))[0, 0].tolist()


@pytest.mark.parametrize("name", ["asinh", "lupton"])
def test_grey_pixels_are_shown_by_the_formula(name):
    for flux in (0.0, 0.01, 0.1, 1.0, 5.0):
        expected = math.asinh(5.8 * flux / 0.29) / math.asinh(0.58) / 10 * 255
        assert all(abs(value - expected) <= 1 for value in shown(name, flux, flux, flux))


@pytest.mark.parametrize("name", ["asinh", "lupton"])
def test_faint_pixels_are_linear_and_the_brightest_are_white(name):
    faint = [shown(name, f, f, f, stretch=1.0, Q=0.01)[0] for f in (0.2, 0.4, 0.8)]
    assert faint == pytest.approx([51, 102, 204], abs=1)
    assert shown(name, 1e6, 1e6, 1e6) == [255, 255, 255]
    assert shown(name, -1.0, -1.0, -1.0) == [0, 0, 0]


def test_lupton_keeps_the_ratios_of_bright_pixels_and_asinh_whitens_them():
    flux = 6.0, 3.0, 1.5
    red, green, blue = shown("lupton", *flux)
    assert red / green == pytest.approx(2, abs=0.03) and green / blue == pytest.approx(2, abs=0.03)
    red, green, blue = shown("asinh", *flux)
    assert red / green < 1.2 and green / blue < 1.25


def test_channels_are_chosen_scaled_and_lifted():
    stretch = Stretch("asinh", 2, 1, 0, scales=(2.0, 1.0, 0.5), minimum=-0.1)
    pixel = stretch(np.tile(np.float32([0.4, 0.1, 0.3]), (1, 1, 1)))[0, 0]
    expected = [math.asinh(20 * (f + 0.1)) / math.asinh(0.58) * 25.5 for f in (0.6, 0.1, 0.2)]
    assert pixel.tolist() == pytest.approx(expected, abs=1)
    assert pixel.dtype == np.uint8
