"""A survey as a job asks for it: its images, and what is known about each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from astropt_ds.errors import UserError, one_line
from astropt_ds.ingest.catalogue import Catalogue, read_catalogue, refuse_doubled
from astropt_ds.ingest.cells import ID_COLUMNS
from astropt_ds.ingest.fits import FitsFolder
from astropt_ds.ingest.hdf5 import HDF5Files
from astropt_ds.ingest.images import ImageFolder
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.parquet import ParquetFiles
from astropt_ds.ingest.source import FILE, ID, Needed, Source

BESIDE = "__beside__"  # the row of the catalogue that is about the image; -1 if none is


@dataclass(frozen=True)
class Survey:
    """The images that a job chooses.

    Attributes:
        source: of the images.
        catalogue: about them, or none.
        rows: ID, FILE, BESIDE and for some sources ROW of each image, in the order of the input.
        about: beside the rows, the columns that the job names.
        notes: what a user should know.
    """

    source: Source
    catalogue: Catalogue | None
    rows: pd.DataFrame
    about: pd.DataFrame
    notes: list[str]


def open_survey(job: Job) -> Survey:
    """Read a survey's tables and choose its images; none of them is looked at.

    Raises:
        UserError: the tables are not there or not usable, or choose no image or one twice.
    """
    source = open_source(job)
    notes = []
    catalogue = read_catalogue_of(job, source) if job.catalogue else None
    if source.sequential:
        rows = source.table(job.needs)
        about = rows
        rows[BESIDE] = -1
        if catalogue:
            rows[BESIDE] = catalogue.beside(rows[ID])
            about = _joined(rows, catalogue, job.needs)
            notes += _unmatched(rows, catalogue)
    else:
        catalogue = catalogue or _listing(source)
        rows, about = _named(job, source, catalogue), catalogue.table
    _check_columns(job, source, catalogue)
    if job.filter:
        kept = _filtered(about, job.filter, _columns(source, catalogue))
        rows, about = rows.loc[kept], about.loc[kept]
    where = str(job.catalogue or job.where)
    if rows.empty:
        raise UserError(f"no images in {where}")
    named = catalogue.id_column if catalogue and not source.sequential else source.id_column
    refuse_doubled(rows[ID], named, where)
    if source.left_out:
        notes.append(f"not used: {_some(list(source.left_out))}")
    return Survey(source, catalogue, rows, about, notes)


def open_source(job: Job) -> Source:
    """The images that a job names."""
    if job.images:
        return ImageFolder(job.images)
    if job.fits:
        return FitsFolder(job.fits, job.bands, job.file_pattern)
    if job.hdf5:
        return HDF5Files(job.hdf5, job.bands, job.id_column, job.columns)
    return ParquetFiles(job.parquet, job.image_column or "image", job.id_column, job.columns)


def read_catalogue_of(job: Job, source: Source) -> Catalogue:
    """The catalogue that a job names.

    Raises:
        UserError: it cannot be read, or has no ids.
    """
    file_column = job.file_column or "file"
    text = [*job.split_columns().values()]
    named, option = job.id_column, "id-column"
    usual: tuple[str, ...] = ID_COLUMNS
    if source.sequential:
        named, option = job.catalogue_id_column or job.id_column, "catalogue-id-column"
        same = (source.id_column,) if source.id_column else ()
        usual = tuple(dict.fromkeys([*same, *usual]))  # called as in the files, if it can be
    else:
        text.append(file_column)

    def wanted(column: str) -> bool:
        return not job.columns or column in (*job.columns, file_column) or job.needs(column)

    assert job.catalogue is not None
    return read_catalogue(job.catalogue, named, option, wanted, text, usual)


def _listing(source: Source) -> Catalogue:
    """The files themselves as a catalogue."""
    found = source.table(lambda column: False)
    table = pd.DataFrame({"id": found[ID], "file": found[FILE]})
    return Catalogue(str(source.base), "id", ["id", "file"], table, found[ID])


def _named(job: Job, source: Source, catalogue: Catalogue) -> pd.DataFrame:
    """The images that a catalogue names."""
    if isinstance(source, FitsFolder) and source.pattern:
        files = catalogue.ids.map(source.place)
    else:
        column = job.file_column or "file"
        if column not in catalogue.table:
            raise UserError(
                f"--file-column {column}: {catalogue.where} has no such column; "
                f"it has {', '.join(catalogue.columns)}"
            )
        files = catalogue.table[column].astype(object)
        files = files.where(files.notna(), None)
    return pd.DataFrame({ID: catalogue.ids, FILE: files, BESIDE: np.arange(len(files))})


def _joined(rows: pd.DataFrame, catalogue: Catalogue, needed: Needed) -> pd.DataFrame:
    """The columns needed, the catalogue's beside the survey's own."""
    known = rows[BESIDE] >= 0
    about = rows.copy(deep=False)
    for name in filter(needed, map(str, catalogue.table)):
        cells = catalogue.table[name].iloc[rows[BESIDE].where(known, 0)].set_axis(rows.index)
        if not known.all() and pd.api.types.is_integer_dtype(cells):
            cells = cells.astype("UInt64" if str(cells.dtype).lower().startswith("u") else "Int64")
        if name in about:  # the two may be of different types
            about[name] = cells.astype(object).where(known, about[name].astype(object))
        else:
            about[name] = cells.where(known)
    return about


def _unmatched(rows: pd.DataFrame, catalogue: Catalogue) -> list[str]:
    alone = int((rows[BESIDE] < 0).sum())
    unused = len(catalogue.ids) - len(rows) + alone
    notes = []
    if alone:
        notes.append(f"{alone} images have no row in {catalogue.where}")
    if unused:
        notes.append(f"{unused} rows of {catalogue.where} have no image")
    return notes


def _columns(source: Source, catalogue: Catalogue | None) -> list[str]:
    return list(dict.fromkeys([*source.columns, *(catalogue.columns if catalogue else ())]))


def _check_columns(job: Job, source: Source, catalogue: Catalogue | None) -> None:
    columns = _columns(source, catalogue)
    where = str(job.catalogue) if not source.sequential else job.where
    if source.sequential and catalogue:
        where = f"{job.where} with {catalogue.where}"
    named = [*job.split_columns().items(), *(("columns", column) for column in job.columns)]
    for option, column in named:
        if column not in columns:
            raise UserError(
                f"--{option.replace('_', '-')} {column}: {where} has no such column; "
                f"it has {', '.join(columns)}"
            )


def _filtered(table: pd.DataFrame, expression: str, columns: list[str]) -> pd.Index:
    """The rows that a condition holds for."""
    try:
        kept = table.query(expression).index
    except Exception as error:  # pandas raises whatever the expression makes it raise
        raise UserError(
            f"--filter {expression!r}: {one_line(error)}; a condition on {', '.join(columns)} "
            "would be right"
        ) from None
    if kept.empty:
        raise UserError(f"--filter {expression!r}: keeps none of {len(table)} rows")
    return kept


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
