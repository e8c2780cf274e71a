"""Simulated galaxies: the same whatever the processes, labelled truthfully, written whole."""

import os
import subprocess
import sys
from pathlib import Path

import galsim
import numpy as np
import pandas as pd
import pytest
import simplejpeg

from astropt_ds.data import simulate
from astropt_ds.errors import UserError

TOOL = Path(simulate.__file__).parents[2] / "tools" / "simulate_galaxies.py"
COLUMNS = ["id", "file", "ra", "dec", *simulate.LABELS]


@pytest.fixture(scope="module")
def stamps() -> tuple[np.ndarray, pd.DataFrame]:
    """Sixty stamps: images (60, 64, 64, 3) and their labels."""
    images, labels = zip(*(simulate.simulate_stamp(i, 3, 64) for i in range(60)), strict=True)
    return np.stack(images), pd.DataFrame(labels)


@pytest.fixture(scope="module")
def population() -> pd.DataFrame:
    """Labels of 3,000 galaxies."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame([simulate.draw_galaxy(rng).labels for _ in range(3000)])
    return table.assign(colour=table.mag_g - table.mag_r)


def rank_correlation(a: pd.Series, b: pd.Series) -> float:
    return float(np.corrcoef(a.rank(), b.rank())[0, 1])


def moments(image: np.ndarray) -> tuple[float, float]:
    """Axis ratio and position angle (degrees) from the second moments of the central blob."""
    grey = image.mean(axis=2)
    y, x = np.indices(grey.shape) - (np.array(grey.shape) - 1)[:, None, None] / 2
    weight = np.clip(grey - np.median(grey) - 10, 0, None) * np.exp(-(x**2 + y**2) / 2 / 8**2)
    covariance = np.cov(np.stack([x.ravel(), y.ravel()]), aweights=weight.ravel())
    values, vectors = np.linalg.eigh(covariance)
    west, south = vectors[:, 1]
    return float(np.sqrt(values[0] / values[1])), float(np.degrees(np.arctan2(west, south)) % 180)


def test_a_stamp_depends_on_its_arguments_only() -> None:
    first, labels = simulate.simulate_stamp(5, seed=1, side=48)
    simulate.simulate_stamp(6, seed=1, side=48)
    again, labels_again = simulate.simulate_stamp(5, seed=1, side=48)
    assert np.array_equal(first, again)
    assert labels == labels_again
    assert not np.array_equal(first, simulate.simulate_stamp(6, seed=1, side=48)[0])
    assert not np.array_equal(first, simulate.simulate_stamp(5, seed=2, side=48)[0])


def test_another_side_shows_the_same_galaxy() -> None:
    assert simulate.simulate_stamp(5, 1, 33)[1] == simulate.simulate_stamp(5, 1, 64)[1]


def test_the_number_of_processes_changes_no_byte(tmp_path: Path) -> None:
    """Through the tool, as users run it: two spawned processes against one."""
    command = [sys.executable, str(TOOL), "--output", str(tmp_path / "two"), "--count", "9"]
    command += ["--side", "32", "--seed", "4", "--processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith(f"9 simulated stamps in {tmp_path / 'two'} (")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""  # no progress bar outside a terminal
    simulate.simulate_survey(tmp_path / "one", count=9, side=32, seed=4, processes=1)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) == 10
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_the_catalogue_describes_every_image(tmp_path: Path) -> None:
    output = simulate.simulate_survey(tmp_path / "new" / "sky", 12, side=40, seed=0, processes=1)
    table = pd.read_csv(output / "catalogue.csv")
    assert list(table.columns) == COLUMNS
    assert list(table.id) == [f"sim-{i:06d}" for i in range(12)]
    assert set(table.file) == {f"images/{path.name}" for path in (output / "images").iterdir()}
    for index, row in enumerate(table.to_dict("records")):
        stored = simplejpeg.decode_jpeg((output / row["file"]).read_bytes())
        image, labels = simulate.simulate_stamp(index, 0, 40)
        assert stored.shape == (40, 40, 3)
        assert np.abs(stored.astype(float) - image).mean() < 12  # JPEG blurs the noise
        assert {label: row[label] for label in simulate.LABELS} == pytest.approx(labels, abs=1e-6)
    assert table.ra.between(0, 360).all()
    assert table.dec.between(-15, 30).all()
    assert table.ra.nunique() == table.dec.nunique() == 12


def test_the_population_is_the_documented_one(population: pd.DataFrame) -> None:
    bounds = {
        "mag_r": (15, 19),
        "redshift": (0.02, 0.45),
        "half_light_radius": (0.7, 5),
        "colour": (0.47, 1.55),
        "bulge_fraction": (0, 1),
        "axis_ratio": (0.16, 0.99),
        "position_angle": (0, 180),
    }
    for label, (low, high) in bounds.items():
        assert population[label].between(low, high).all(), label
    median = population.median()
    assert median.redshift == pytest.approx(0.14, abs=0.015)
    assert median.half_light_radius == pytest.approx(1.8, abs=0.1)
    assert median.bulge_fraction == pytest.approx(0.26, abs=0.03)


def test_farther_galaxies_are_fainter_smaller_and_redder(population: pd.DataFrame) -> None:
    assert 0.5 < rank_correlation(population.redshift, population.mag_r) < 0.95
    assert 0.4 < rank_correlation(population.redshift, population.colour) < 0.95
    assert -0.95 < rank_correlation(population.redshift, population.half_light_radius) < -0.4


def test_half_the_light_lies_within_the_half_light_radius() -> None:
    """GalSim's own profiles agree with the radius that the label gives."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        galaxy = simulate.draw_galaxy(rng)
        radius, bulge = galaxy.labels["half_light_radius"], galaxy.labels["bulge_fraction"]
        inside = bulge * galsim.Sersic(
            4, half_light_radius=galaxy.radius_bulge
        ).calculateIntegratedFlux(radius) + (1 - bulge) * galsim.Sersic(
            1, half_light_radius=galaxy.radius_disc
        ).calculateIntegratedFlux(radius)
        assert inside == pytest.approx(0.5, abs=0.005)


def test_bulge_and_disc_add_up_to_the_magnitudes() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        galaxy = simulate.draw_galaxy(rng)
        assert (galaxy.flux_bulge >= 0).all() and (galaxy.flux_disc >= 0).all()
        magnitudes = 22.5 - 2.5 * np.log10(galaxy.flux_bulge + galaxy.flux_disc)
        expected = [galaxy.labels[f"mag_{band}"] for band in "grz"]
        assert magnitudes == pytest.approx(expected, abs=1e-9)


def test_images_show_the_labels(stamps: tuple[np.ndarray, pd.DataFrame]) -> None:
    images, labels = stamps
    assert images.shape == (60, 64, 64, 3)
    assert images.dtype == np.uint8
    flux = pd.Series(images[:, 16:-16, 16:-16].sum(axis=(1, 2, 3), dtype=float))
    assert rank_correlation(flux, labels.mag_r) < -0.85
    red, _, blue = images[:, 24:-24, 24:-24].sum(axis=(1, 2), dtype=float).T
    assert rank_correlation(pd.Series(red / blue), labels.mag_g - labels.mag_z) > 0.85


def test_images_show_shape_and_orientation(stamps: tuple[np.ndarray, pd.DataFrame]) -> None:
    """North is up and east is left, or the position angles would not fit."""
    images, labels = stamps
    axis_ratio, angle = map(pd.Series, zip(*map(moments, images), strict=True))
    assert rank_correlation(axis_ratio, labels.axis_ratio) > 0.7
    difference = (angle - labels.position_angle + 90) % 180 - 90
    assert difference[labels.axis_ratio < 0.6].abs().median() < 6


def test_the_sky_is_dark_and_noisy(stamps: tuple[np.ndarray, pd.DataFrame]) -> None:
    """As in Legacy Survey cutouts: the corners are mostly empty sky."""
    corner = stamps[0][:, :12, :12].reshape(-1, 3)
    assert (np.median(corner, axis=0) > 8).all()
    assert (np.median(corner, axis=0) < 35).all()
    assert (corner.std(axis=0) > 5).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count must be 1 stamp or more, not 0"),
        ({"side": 15}, "side must be 16 pixels or more, not 15"),
        ({"seed": -1}, "seed must be 0 or more, not -1"),
        ({"processes": 0}, "processes must be 1 or more, not 0"),
        ({"quality": 101}, "quality must be 1 to 100, not 101"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    options = {"count": 1, "side": 16, "seed": 0, "processes": 1} | change
    with pytest.raises(UserError, match=message):
        simulate.simulate_survey(tmp_path / "sky", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "sky").mkdir()
    (tmp_path / "sky" / "precious").touch()
    with pytest.raises(UserError, match="exists already"):
        simulate.simulate_survey(tmp_path / "sky", 1, side=16, seed=0, processes=1)
    assert [path.name for path in (tmp_path / "sky").iterdir()] == ["precious"]


def test_an_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        simulate.simulate_survey(tmp_path / "file" / "sky", 1, side=16, seed=0, processes=1)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = simulate.simulate_stamp

    def interrupted(index: int, seed: int, side: int) -> tuple[np.ndarray, dict[str, float]]:
        if index == 2:
            raise KeyboardInterrupt
        return draw(index, seed, side)

    monkeypatch.setattr(simulate, "simulate_stamp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate.simulate_survey(tmp_path / "sky", 4, side=16, seed=0, processes=1)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    stale = tmp_path / "sky.partial" / "images" / "000099.jpg"
    stale.parent.mkdir(parents=True)
    stale.touch()
    output = simulate.simulate_survey(tmp_path / "sky", 1, side=16, seed=0, processes=1)
    assert [path.name for path in (output / "images").iterdir()] == ["000000.jpg"]
    assert [path.name for path in tmp_path.iterdir()] == ["sky"]


def test_without_galsim_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "galsim", None)
    with pytest.raises(UserError, match=r"pip install 'astropt-ds\[demo\]'"):
        simulate.simulate_survey(tmp_path / "sky", 1, side=16, seed=0, processes=1)
    with pytest.raises(UserError, match="GalSim"):
        simulate.simulate_stamp(0, 0, 16)
    assert not list(tmp_path.iterdir())
