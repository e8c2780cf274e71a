"""Simulated galaxy stamps that look like DESI Legacy Survey cutouts, with true labels.

They let anyone try pretraining and probing without downloading a survey. They do not replace real
galaxies: say "simulated" beside numbers that rest on them.

The sky: g, r and z at 0.262 arcsec a pixel, north up and east left, with the seeing and depth of
the DESI Legacy Survey (Dey et al. 2019, AJ 157, 168), noise limited by the sky. Red, green and
blue show z, r and g through the asinh stretch of Lupton et al. (2004, PASP 116, 133).

The population (a galaxy outside these bounds is drawn again):

| label             | unit   | bounds       | drawn from                                           |
|-------------------|--------|--------------|------------------------------------------------------|
| mag_r             | AB mag | 15 to 19     | counts that rise towards the faint end               |
| g - r             | mag    | 0.47 to 1.55 | 42 % red sequence, 58 % blue cloud, redder with z    |
| redshift          |        | 0.02 to 0.45 | mag_r and a Gaussian absolute magnitude; median 0.14 |
| half_light_radius | arcsec | 0.7 to 5     | size-luminosity relations, distance; median 1.8      |
| bulge_fraction    |        | 0 to 1       | Beta distributions, of the r flux; median 0.26       |
| axis_ratio        |        | 0.16 to 0.99 | oblate discs and bulges at random inclinations       |
| position_angle    | degree | 0 to 180     | uniform, from north through east                     |

Farther galaxies are thus fainter, smaller and redder on the whole, with scatter. Magnitudes are
totals; the half-light radius is the whole galaxy's, along its major axis, before the seeing; the
axis ratio is the flux-weighted mean of bulge and disc.
"""

import math
import os
import shutil
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import simplejpeg
from tqdm import tqdm

from astropt_ds.data.parallel import parallel
from astropt_ds.data.stretch import Stretch
from astropt_ds.errors import UserError

try:
    import astropy.visualization  # noqa: F401, of which the stretch makes use
    import galsim
except ImportError:  # An optional extra; simulating without it says how to get it.
    galsim = None

# Bands are in the order g, r, z; fluxes are in nanomaggies (AB zero point 22.5).
LABELS = (
    *("mag_g", "mag_r", "mag_z", "redshift"),
    *("half_light_radius", "bulge_fraction", "axis_ratio", "position_angle"),
)
SHOWN = Stretch("lupton", red=2, green=1, blue=0)
MIN_SIDE = 16  # pixels
PIXEL_SCALE = 0.262  # arcsec
SEEING = np.array([1.29, 1.18, 1.11])  # arcsec, median FWHM, as measured on the pixels
DEPTH = np.array([24.7, 23.9, 23.0])  # AB mag, median, 5 sigma for a point source
RED_FRACTION = 0.42
KNOTS = 16
NEIGHBOURS_PER_ARCMIN2 = 22.0  # brighter than r = 24


@dataclass(frozen=True)
class Galaxy:
    """A galaxy of the population: its true labels, and what only its picture needs."""

    labels: dict[str, float]  # the LABELS
    flux_bulge: np.ndarray  # (3,) nanomaggies
    flux_disc: np.ndarray  # (3,) nanomaggies, with the knots
    radius_bulge: float  # half-light, arcsec, major axis
    radius_disc: float  # half-light, arcsec, major axis
    q_bulge: float  # apparent axis ratio
    q_disc: float  # apparent axis ratio
    knot_share: float  # fraction of the disc's r flux that is in star-forming knots


def simulate_stamp(index: int, seed: int, side: int) -> tuple[np.ndarray, dict[str, float]]:
    """Simulate galaxy ``index`` of the survey ``seed``, within half a pixel of the stamp's centre.

    Returns the image, uint8 (side, side, 3), and the LABELS (the module gives units and ranges).
    The same arguments always give the same stamp; the labels do not depend on ``side``.
    """
    _check(index >= 0, f"the index must be 0 or more, not {index}")
    _check_survey(seed, side)
    # Each stamp has its own stream: neither order nor processes matter.
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
    galaxy = draw_galaxy(rng)
    fluxes = _observe(galaxy, side, rng)[:, ::-1]
    return SHOWN(np.moveaxis(fluxes, 0, 2)), galaxy.labels


def simulate_survey(
    output: Path, count: int, side: int, seed: int, processes: int, quality: int = 90
) -> Path:
    """Write ``count`` stamps to output/images/*.jpg and their labels to output/catalogue.csv.

    The catalogue has a row a stamp: id, file (relative to ``output``), ra and dec (degrees; dec
    -15 to 30, uniform on the sphere) and the LABELS. Nothing depends on ``processes``. ``output``
    appears complete or not at all; returns its absolute path.
    """
    output = Path(output).resolve()
    _check(count >= 1, f"the count must be 1 stamp or more, not {count}")
    _check(processes >= 1, f"the number of processes must be 1 or more, not {processes}")
    _check(1 <= quality <= 100, f"the JPEG quality must be 1 to 100, not {quality}")
    _check_survey(seed, side)
    _check(not output.exists(), f"{output} exists already: name a new folder, or remove it first")
    unfinished = output.with_name(output.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        (unfinished / "images").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {unfinished}: {error.strerror}") from error
    try:
        work = partial(_write_stamp, folder=unfinished, seed=seed, side=side, quality=quality)
        with closing(parallel(work, range(count), processes)) as rows:
            table = pd.DataFrame(tqdm(rows, total=count, unit="stamp", disable=None))
        table.to_csv(unfinished / "catalogue.csv", index=False, float_format="%.6f")
        os.rename(unfinished, output)
    except BaseException:  # An interrupt too: nothing that looks like a survey may stay.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return output


def draw_galaxy(rng: np.random.Generator) -> Galaxy:
    """Draw a galaxy of the population that the module describes."""
    red = rng.random() < RED_FRACTION
    while True:
        mag_r = 15 + 4 * rng.random() ** 0.65
        mean, scatter = (-22.0, 0.6) if red else (-21.2, 0.7)  # of the absolute magnitude
        faint = rng.normal(0, scatter)
        redshift = float(np.interp(mag_r - mean - faint, _MODULUS_GRID, _REDSHIFT_GRID))
        if red:
            kpc = 4.4 * 10 ** (-0.22 * faint + rng.normal(0, 0.12))
            colour = 0.70 + 2.1 * redshift - 0.02 * faint + rng.normal(0, 0.03)
        else:
            kpc = 4.1 * 10 ** (-0.12 * faint + rng.normal(0, 0.15))
            colour = 0.47 + 1.1 * redshift - 0.05 * faint + rng.normal(0, 0.07)
        radius = 206.265 * kpc * (1 + redshift) ** 2 / _distance(redshift)
        bulge = rng.beta(3.2, 2.8) if red else rng.beta(1.3, 6.5)
        # Oblate spheroids seen at one inclination: a thin disc and a rounder bulge.
        thickness = np.array([rng.uniform(0.14, 0.24), 0.6])
        q_disc, q_bulge = np.hypot(rng.random() * np.sqrt(1 - thickness**2), thickness)
        q = bulge * q_bulge + (1 - bulge) * q_disc
        bounds = ((redshift, 0.02, 0.45), (colour, 0.47, 1.55), (radius, 0.7, 5), (q, 0.16, 0.99))
        if all(low <= value <= high for value, low, high in bounds):
            break
    mag = mag_r + np.array([colour, 0.0, -0.05 - 0.55 * colour + rng.normal(0, 0.04)])
    # Bulges are redder than their discs, most of all in blue galaxies.
    gradient = (0.1 if red else 0.22) * (1 - bulge)
    flux_bulge = _flux(mag) * bulge * _flux(22.5 + gradient * np.array([1.0, 0.0, -0.6]))
    ratio = rng.uniform(0.7, 1.0) if red else rng.uniform(0.25, 0.6)
    radius_disc = radius / _composite_radius(bulge, ratio)
    values = (*mag, redshift, radius, bulge, q, 180 * rng.random())
    return Galaxy(
        labels={label: float(value) for label, value in zip(LABELS, values, strict=True)},
        flux_bulge=flux_bulge,
        flux_disc=_flux(mag) - flux_bulge,
        radius_bulge=radius_disc * ratio,
        radius_disc=radius_disc,
        q_bulge=q_bulge,
        q_disc=q_disc,
        knot_share=0.0 if red else rng.uniform(0.05, 0.35),
    )


def _flux(mag: np.ndarray) -> np.ndarray:
    return 10 ** (0.4 * (22.5 - mag))


def _distance(redshift: Any) -> Any:
    """Luminosity distance in Mpc to second order in redshift (H0 70 km/s/Mpc, Omega_m 0.3)."""
    return 4283 * redshift * (1 + 0.775 * redshift)


_REDSHIFT_GRID = np.geomspace(0.01, 0.6, 400)
# Apparent minus absolute r magnitude: the distance modulus and a K correction of about z.
_MODULUS_GRID = 5 * np.log10(_distance(_REDSHIFT_GRID)) + 25 + _REDSHIFT_GRID


def _composite_radius(bulge: float, ratio: float) -> float:
    """Half-light radius of the whole; unit: the disc's. ``ratio``: the bulge's, in this unit."""
    radius = np.linspace(0.05, 2.0, 400)
    y = 1.67835 * radius
    disc_inside = 1 - (1 + y) * np.exp(-y)
    y = 7.66925 * (radius / ratio) ** 0.25
    # The incomplete gamma function P(8, y) of n = 4: elementary, as 8 is an integer.
    bulge_inside = 1 - np.exp(-y) * sum(y**k / math.factorial(k) for k in range(8))
    return float(np.interp(0.5, bulge * bulge_inside + (1 - bulge) * disc_inside, radius))


def _observe(galaxy: Galaxy, side: int, rng: np.random.Generator) -> np.ndarray:
    """The survey's images, nanomaggies, float32 (3, side, side); rows go north, columns west."""
    seeing = SEEING * rng.lognormal(0, 0.10) * rng.lognormal(0, 0.03, 3)
    depth = DEPTH + rng.normal(0, 0.2) + rng.normal(0, 0.08, 3)
    centre = rng.uniform(-0.5, 0.5, 2) * PIXEL_SCALE
    # Coarser than GalSim's defaults, and well below the noise; set once: passing it on is slow.
    params = galsim.GSParams(folding_threshold=1e-2, maxk_threshold=5e-3, kvalue_accuracy=1e-4)
    scene = [(profile.shift(*centre), flux) for profile, flux in _components(galaxy, rng)]
    scene += _neighbours(side, rng)
    scene = [(profile.withGSParams(params), flux) for profile, flux in scene]
    images = np.empty((3, side, side), np.float32)
    for band in range(3):
        sky = galsim.Sum([profile * flux[band] for profile, flux in scene])
        psf = galsim.Moffat(beta=3.5, fwhm=seeing[band], gsparams=params)
        image = galsim.ImageF(images[band], scale=PIXEL_SCALE)
        galsim.Convolve(sky, psf).drawImage(image, method="no_pixel")  # the seeing has the pixel
    noise_pixels = 4 * math.pi * (seeing / 2.355 / PIXEL_SCALE) ** 2  # of a point source
    sigma = _flux(depth) / 5 / np.sqrt(noise_pixels)
    return images + sigma[:, None, None] * rng.standard_normal(images.shape, np.float32)


def _components(galaxy: Galaxy, rng: np.random.Generator) -> list[tuple[Any, np.ndarray]]:
    """Bulge, disc and knots: profiles of unit flux, each with its flux in the bands (3,)."""
    # From the +x axis, which is west, through north; position angles start at north.
    angle = (galaxy.labels["position_angle"] + 90) * galsim.degrees
    # A shear keeps the area: these circles become ellipses with the right major axes.
    bulge = galsim.DeVaucouleurs(half_light_radius=galaxy.radius_bulge * galaxy.q_bulge**0.5)
    disc = galsim.Exponential(half_light_radius=galaxy.radius_disc * galaxy.q_disc**0.5)
    # Knots are bluer than the disc, from whose flux theirs is taken.
    knots = galaxy.flux_disc * galaxy.knot_share * _flux(22.5 + np.array([-0.15, 0.0, 0.1]))
    parts = [
        (bulge.shear(q=galaxy.q_bulge, beta=angle), galaxy.flux_bulge),
        (disc.shear(q=galaxy.q_disc, beta=angle), galaxy.flux_disc - knots),
    ]
    if galaxy.knot_share > 0:
        # Along two logarithmic spiral arms, or all over a disc without arms.
        radius = galaxy.radius_disc * rng.uniform(0.4, 2.0, KNOTS)
        pitch = math.radians(rng.uniform(14, 30)) * rng.choice([-1, 1])
        theta = np.log(radius / galaxy.radius_disc) / math.tan(pitch) + math.pi * np.arange(KNOTS)
        scatter = 0.2 if rng.random() < 0.7 else math.pi
        theta += rng.uniform(0, 2 * math.pi) + scatter * rng.standard_normal(KNOTS)
        along, across = radius * np.cos(theta), radius * galaxy.q_disc * np.sin(theta)
        places = (along + 1j * across) * np.exp(1j * angle.rad)
        knot = galsim.Gaussian(sigma=0.12 * galaxy.radius_disc)
        for place, share in zip(places, rng.dirichlet(np.full(KNOTS, 4.0)), strict=True):
            parts.append((knot.shift(place.real, place.imag), share * knots))
    return parts


def _neighbours(side: int, rng: np.random.Generator) -> list[tuple[Any, np.ndarray]]:
    """Stars and small galaxies: profiles of unit flux, each with its flux in the bands (3,)."""
    width = side * PIXEL_SCALE
    parts = []
    for _ in range(rng.poisson(NEIGHBOURS_PER_ARCMIN2 * (width / 60) ** 2)):
        mag_r = max(15.5, 24 + math.log10(1 - rng.random()) / 0.35)
        colour = rng.normal(0.75, 0.3)
        profile = galsim.DeltaFunction()
        if rng.random() < 0.7:
            disc = galsim.Exponential(half_light_radius=rng.uniform(0.2, 0.8))
            profile = disc.shear(q=rng.uniform(0.3, 1), beta=rng.uniform(0, 180) * galsim.degrees)
        place = rng.uniform(-width / 2, width / 2, 2)
        flux = _flux(mag_r + np.array([colour, 0.0, -0.05 - 0.55 * colour]))
        parts.append((profile.shift(*place), flux))
    return parts


def _write_stamp(index: int, folder: Path, seed: int, side: int, quality: int) -> dict[str, Any]:
    """Write the image of a stamp; returns its row of the catalogue."""
    image, labels = simulate_stamp(index, seed, side)
    file = f"images/{index:06d}.jpg"
    (folder / file).write_bytes(simplejpeg.encode_jpeg(image, quality=quality))
    rng = np.random.default_rng([seed, index, 1])  # the 1: another stream than the stamp's
    ra, sin_dec = rng.uniform([0, np.sin(np.radians(-15))], [360, np.sin(np.radians(30))])
    dec = math.degrees(math.asin(sin_dec))
    return {"id": f"sim-{index:06d}", "file": file, "ra": ra, "dec": dec, **labels}


def _check_survey(seed: int, side: int) -> None:
    _check(seed >= 0, f"the seed must be 0 or more, not {seed}")
    _check(side >= MIN_SIDE, f"the side must be {MIN_SIDE} pixels or more, not {side}")
    _check(galsim is not None, "GalSim or Astropy is missing: pip install 'astropt-ds[demo]'")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
