from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astropt_ds.errors import UserError
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.source import FILE, ID
from astropt_ds.ingest.splits import assign, split_of, tiles_of

JOB = {"output": Path("o"), "images": Path("i"), "val_fraction": 0.2, "test_fraction": 0.2}


def assigned(rows, columns=None, **options):
    return assign(Job(**{**JOB, **options}), rows, pd.DataFrame() if columns is None else columns)


def images(count):
    ids = [f"g{i}" for i in range(count)]
    return pd.DataFrame({ID: ids, FILE: [f"{i}.jpg" for i in ids]})


def test_fractions_are_those_asked_for():
    splits = [split_of(str(i), 0.1, 0.2) for i in range(5000)]
    assert abs(splits.count("val") / 5000 - 0.1) < 0.02
    assert abs(splits.count("test") / 5000 - 0.2) < 0.02


@given(st.integers(0, 6), st.integers(0, 2**32))
def test_no_tile_of_the_sky_is_in_two_splits(order, seed):
    from astropy import units
    from astropy_healpix import HEALPix

    rng = np.random.default_rng(seed)
    ra, dec = rng.uniform(0, 360, 300), np.degrees(np.arcsin(rng.uniform(-1, 1, 300)))
    columns = pd.DataFrame({"ra": ra, "dec": dec})
    splits = assigned(images(300), columns, healpix_order=order).names
    tiles = HEALPix(2**order, order="nested").lonlat_to_healpix(ra * units.deg, dec * units.deg)
    assert (splits.groupby(tiles).nunique() == 1).all()
    assert splits.nunique() > 1 or len(set(tiles)) < 30


def test_the_split_of_a_place_does_not_depend_on_the_rest_of_the_survey():
    whole = pd.DataFrame({"ra": [*np.linspace(0, 350, 50), None], "dec": 10.0})
    part = whole[:50]
    names = assigned(images(51), whole, healpix_order=3).names
    assert list(names[:50]) == list(assigned(images(50), part, healpix_order=3).names)
    assert len(set(names[:50])) == 3


def test_images_without_a_place_on_the_sky_have_no_tile():
    ra = pd.Series([10.0, np.nan, 10.0, 370.0, None])
    dec = pd.Series([20.0, 20.0, 91.0, 20.0, np.nan])
    tiles = tiles_of(ra, dec, 5)
    assert list(tiles.isna()) == [False, True, True, False, True]
    assert tiles[0] == tiles[3]  # right ascension wraps
    columns = pd.DataFrame({"ra": ra, "dec": dec})
    made = assigned(images(5), columns, healpix_order=5)
    assert list(made.names.isna()) == list(tiles.isna()) and made.lacks == "no ra and dec"


def test_a_row_without_a_group_is_its_own():
    group = pd.Series([None, 7.0, 7.0])
    names = assigned(images(3), pd.DataFrame({"field": group}), group_column="field").names
    assert list(names) == [split_of(g, 0.2, 0.2) for g in ("g0", "7", "7")]


def test_a_column_gives_the_splits():
    column = pd.Series(["train", "VALIDATION", "valid", "dev", "val", b"test", None])
    options = {"split_column": "s", "val_fraction": None, "test_fraction": None}
    made = assigned(images(7), pd.DataFrame({"s": column}), **options)
    assert list(made.names[:6]) == ["train", "val", "val", "val", "val", "test"]
    assert pd.isna(made.names[6]) and made.lacks == "no s"
    with pytest.raises(UserError, match="--split-column s: holds 'extra' in 2 rows; train, val"):
        columns = pd.DataFrame({"s": ["train", "extra", "extra"]})
        assigned(images(3), columns, **options)


def test_paths_give_the_splits_where_every_one_names_one():
    given = {"val_fraction": None, "test_fraction": None}
    rows = images(3).assign(**{FILE: ["train/a.jpg", "val/b.jpg", "train/c.jpg"]})
    made = assigned(rows, **given)
    assert list(made.names) == ["train", "val", "train"]
    assert made.how == "as the names of the files say"
    mixed = rows.assign(**{FILE: ["train/a.jpg", "val/b.jpg", "more/c.jpg"]})
    assert assigned(mixed, **given).how == "by id"


def test_fractions_of_given_splits_are_refused():
    rows = images(1).assign(**{FILE: "train/a.jpg"})
    with pytest.raises(UserError, match="--val-fraction 0.2: the names of the files give"):
        assigned(rows)
    columns = pd.DataFrame({"s": ["train"]})
    with pytest.raises(UserError, match="--test-fraction 0.2: --split-column s gives"):
        assigned(images(1), columns, split_column="s", val_fraction=None)
