"""A catalogue: a table whose rows are about the images, wherever those lie."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as ds

from astropt_ds.errors import UserError, one_line
from astropt_ds.extras import optional
from astropt_ds.ids import PADDING
from astropt_ds.ingest.cells import ID_COLUMNS, id_column, texts
from astropt_ds.ingest.parquet import column_names, to_frame
from astropt_ds.ingest.source import find_files

PARQUET = (".parquet", ".pq")
FITS = (".fits", ".fit", ".fits.gz", ".fits.fz")
VOTABLE = (".vot", ".votable", ".xml", ".vot.gz")


@dataclass(frozen=True)
class Catalogue:
    """A catalogue in memory.

    Attributes:
        where: what the user calls it.
        id_column: of the ids among its columns.
        columns: names of all its columns.
        table: its rows, with the columns that were asked for.
        ids: of the rows, as text.
    """

    where: str
    id_column: str
    columns: list[str]
    table: pd.DataFrame
    ids: pd.Series

    def labels(self, columns: Sequence[str]) -> pd.DataFrame:
        """The columns that become labels; all if none is named."""
        return self.table[[c for c in self.table if c in columns]] if columns else self.table

    def beside(self, ids: pd.Series) -> np.ndarray:
        """The row about each of some ids; -1 where there is none.

        Raises:
            UserError: an id has two rows, or none of them has any.
        """
        refuse_doubled(self.ids, self.id_column, self.where)
        rows = pd.Index(self.ids).get_indexer(pd.Index(ids))
        if len(ids) and (rows < 0).all():
            raise UserError(
                f"--catalogue {self.where}: column {self.id_column!r} holds none of the images' "
                f"ids, as {self.ids.iloc[0]!r} there and {ids.iloc[0]!r} here; "
                "--catalogue-id-column names another"
            )
        return rows


def read_catalogue(
    path: Path,
    named_id: str | None,
    option: str,
    wanted: Callable[[str], bool],
    text: Sequence[str],
    usual: Sequence[str] = ID_COLUMNS,
) -> Catalogue:
    """Read a catalogue: CSV, a Parquet file or a folder of them, a FITS table or a VOTable.

    Integers and ids keep every digit, whether there are gaps among them or not.

    Args:
        path: the file; what has no known suffix is CSV.
        named_id: the column of the ids; the first of the usual ones if None.
        option: the option that names this column, for messages.
        wanted: whether to read a column.
        text: columns to read as they are written where the file does not say what they are: '007'
            is not 7.
        usual: where ids are looked for, the first first.

    Raises:
        UserError: it cannot be read, or has no ids.
    """
    try:
        columns, read = _reader(path)
    except UserError:
        raise
    except Exception as error:  # the readers raise whatever a damaged file makes them raise
        raise UserError(f"--catalogue {path}: cannot be read ({one_line(error)})") from None
    ids = id_column(named_id, columns, option, str(path), usual)
    chosen = [name for name in columns if name == ids or wanted(name)]
    try:
        table = read(chosen, [name for name in chosen if name in text], ids)
    except Exception as error:
        raise UserError(f"--catalogue {path}: cannot be read ({one_line(error)})") from None
    return Catalogue(str(path), ids, columns, table, texts(table[ids], ids, str(path)))


def refuse_doubled(ids: pd.Series, column: str, where: str) -> None:
    """Every id names one thing; raises UserError."""
    doubled = ids[ids.duplicated()]
    if len(doubled):
        raise UserError(
            f"{where}: column {column!r} holds {len(doubled)} ids twice, "
            f"{doubled.iloc[0]!r} for one; an id of its own for each image would be right"
        )


Read = Callable[[list[str], list[str], str], pd.DataFrame]  # columns, those of text, that of ids


def _reader(path: Path) -> tuple[list[str], Read]:
    """The names of a catalogue's columns, and what reads some of them."""
    name = path.name.lower()
    if path.is_dir() or name.endswith(PARQUET):
        return _parquet(path)
    if name.endswith(FITS) or name.endswith(VOTABLE):
        return _astropy(path, "fits" if name.endswith(FITS) else "votable")
    return _csv(path)


def _csv(path: Path) -> tuple[list[str], Read]:
    def read(columns: list[str], text: list[str], ids: str) -> pd.DataFrame:
        table = pd.read_csv(
            path,
            usecols=columns,
            dtype=dict.fromkeys(text, str),
            dtype_backend="numpy_nullable",
            low_memory=False,
        )
        # an id may be called NA or null
        raw = pd.read_csv(path, usecols=[ids], dtype=str, keep_default_na=False)
        return table.assign(**{ids: raw[ids]})

    return list(pd.read_csv(path, nrows=0).columns), read


def _parquet(path: Path) -> tuple[list[str], Read]:
    files = find_files([path], PARQUET, "--catalogue")
    dataset = ds.dataset([str(file) for file in files], format="parquet")

    def read(columns: list[str], text: list[str], ids: str) -> pd.DataFrame:
        return to_frame(dataset.to_table(columns=columns))

    return column_names(dataset.schema), read


def _astropy(path: Path, kind: str) -> tuple[list[str], Read]:
    table = optional("astropy.table", f"--catalogue {path}").Table
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about units that it does not know
        rows = table.read(path, format=kind)
    rows.convert_bytestring_to_unicode()

    def read(columns: list[str], text: list[str], ids: str) -> pd.DataFrame:
        flat = [name for name in columns if rows[name].ndim == 1]
        frame = rows[flat].to_pandas()
        cells: dict[str, Any] = {
            name: frame[name] if name in flat else rows[name].tolist() for name in columns
        }
        return pd.DataFrame({name: _unpadded(pd.Series(column)) for name, column in cells.items()})

    return list(rows.colnames), read


def _unpadded(column: pd.Series) -> pd.Series:
    if not pd.api.types.is_string_dtype(column):
        return column
    return column.map(lambda cell: cell.rstrip(PADDING) if isinstance(cell, str) else cell)
