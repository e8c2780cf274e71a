"""Which split an image goes to."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import pandas as pd

from astropt_ds.data.manifest import SPLITS
from astropt_ds.data.split_names import SPLIT_OF_WORD, split_in_path
from astropt_ds.errors import UserError
from astropt_ds.extras import optional
from astropt_ds.ids import text_of
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.source import FILE, ID


class Splits(NamedTuple):
    """The split of each row of a table.

    Attributes:
        names: of SPLITS; missing for a row that can go to none.
        how: they were made, for the report.
        lacks: what the rows without a split have not.
    """

    names: pd.Series
    how: str
    lacks: str = ""


def assign(job: Job, rows: pd.DataFrame, columns: pd.DataFrame) -> Splits:
    """The splits of a survey as its job asks for them.

    Args:
        job: what was asked for.
        rows: ID and FILE of the images.
        columns: beside the rows, the columns that the job names.

    Raises:
        UserError: what a column holds is no split, or fractions are asked for where the splits
            are given.
    """
    if job.split_column:
        _refuse_fractions(job, f"--split-column {job.split_column} gives the splits")
        names = _named_in(columns[job.split_column], job.split_column)
        return Splits(names, f"as column {job.split_column} says", f"no {job.split_column}")
    if job.healpix_order is not None:
        tiles = tiles_of(columns[job.ra_column], columns[job.dec_column], job.healpix_order)
        name = f"healpix-{job.healpix_order}/{{}}".format
        named = tiles.astype(object).map(name, na_action="ignore")  # integers, gaps or not
        how = f"by HEALPix tile of order {job.healpix_order}"
        return Splits(_hashed(job, named), how, f"no {job.ra_column} and {job.dec_column}")
    if job.group_column:
        values = columns[job.group_column]
        groups = rows[ID].copy()  # a row without a group is its own
        groups[values.notna()] = values[values.notna()].astype(object).map(text_of)
        return Splits(_hashed(job, groups), f"by group ({job.group_column})")
    if (by_path := _named_by_path(rows[FILE])) is not None:
        _refuse_fractions(job, "the names of the files give the splits")
        return Splits(by_path, "as the names of the files say")
    return Splits(_hashed(job, rows[ID]), "by id")


def split_of(group: str, val_fraction: float, test_fraction: float) -> str:
    """The split of an id or group: a pure function of its name, whatever else the survey holds."""
    share = int.from_bytes(hashlib.sha256(f"split/{group}".encode()).digest()[:8], "big") / 2**64
    if share < test_fraction:
        return "test"
    return "val" if share < test_fraction + val_fraction else "train"


def tiles_of(ra: pd.Series, dec: pd.Series, order: int) -> pd.Series:
    """The number of the HEALPix tile of a sky position, nested; missing where there is none.

    Args:
        ra: right ascension, degrees.
        dec: declination, degrees.
        order: 12 * 4**order tiles cover the sky.
    """
    healpix = optional("astropy_healpix", "--healpix-order")
    units = optional("astropy.units", "--healpix-order")
    lon, lat = (
        pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
        for column in (ra, dec)
    )
    known = np.isfinite(lon) & (np.abs(lat) <= 90)
    tiles = pd.Series(pd.NA, index=ra.index, dtype="Int64")
    tiles[known] = healpix.HEALPix(nside=2**order, order="nested").lonlat_to_healpix(
        lon[known] * units.deg, lat[known] * units.deg
    )
    return tiles


def _hashed(job: Job, groups: pd.Series) -> pd.Series:
    def split(group: str) -> str:
        return split_of(group, *job.fractions)

    names: pd.Series = groups.astype(object).map(split, na_action="ignore")
    return names


def _named_in(column: pd.Series, name: str) -> pd.Series:
    texts = column.astype(object).map(lambda value: text_of(value).lower(), na_action="ignore")
    splits = texts.map(SPLIT_OF_WORD)
    if len(others := column[splits.isna() & texts.notna()]):
        value = text_of(others.iloc[0])
        count = int((others.map(text_of) == value).sum())
        raise UserError(
            f"--split-column {name}: holds {value!r} in {count} rows; "
            f"{', '.join(SPLITS)} would be right"
        )
    return splits


def _named_by_path(files: pd.Series) -> pd.Series | None:
    """The split that each file's path names, if every one does."""
    unique = files.unique()
    found = {file: None if pd.isna(file) else split_in_path(str(file)) for file in unique}
    if not found or any(split is None for split in found.values()):
        return None
    return files.astype(object).map(found)


def _refuse_fractions(job: Job, why: str) -> None:
    for option in ("val_fraction", "test_fraction"):
        if getattr(job, option) is not None:
            raise UserError(
                f"--{option.replace('_', '-')} {getattr(job, option)}: {why}; leave it out"
            )
