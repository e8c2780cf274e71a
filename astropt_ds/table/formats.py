"""The formats of a table's files, and what each of them offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from astropt_ds.errors import UserError
from astropt_ds.table.arrow import Arrow
from astropt_ds.table.fits import Fits
from astropt_ds.table.hdf5 import HDF5
from astropt_ds.table.npy import Npy
from astropt_ds.table.parquet import Parquet


class Writer(Protocol):
    """A file in the making."""

    def write(self, table: pa.Table) -> None:
        """Append rows."""


class Stored(Protocol):
    """A file, opened for reading."""

    @property
    def schema(self) -> pa.Schema:
        """Of the table that was written."""

    @property
    def rows(self) -> int:
        """In the file."""

    def read(self, columns: list[str] | None = None, rows: np.ndarray | None = None) -> pa.Table:
        """Some columns of some rows, in the order asked for; all if None."""


class Format(Protocol):
    """How tables are stored."""

    @property
    def name(self) -> str:
        """In FORMATS."""

    @property
    def suffix(self) -> str:
        """Of its files."""

    def fit(self, schema: pa.Schema) -> pa.Schema:
        """The schema that such a table has in this format, which loses nothing.

        Raises:
            UserError: the format needs a library that is not installed.
        """

    def create(
        self, path: Path, schema: pa.Schema, rows: int, widths: Mapping[str, int]
    ) -> AbstractContextManager[Writer]:
        """A new file.

        Args:
            path: of it.
            schema: of the table.
            rows: that will be written in all.
            widths: bytes of the longest value of each column of text.

        Raises:
            UserError: the format cannot hold it.
        """

    def open(self, path: Path) -> Stored:
        """A file; raises UserError where it is damaged."""


FORMATS: dict[str, Format] = {
    form.name: form for form in (Parquet(), Fits(), HDF5(), Arrow(), Npy())
}


class Files(Sequence[Stored]):
    """The files of a table, each opened anew when it is asked for: there may be very many.

    Args:
        form: of all of them.
        paths: of each.
    """

    def __init__(self, form: Format, paths: Sequence[Path]) -> None:
        self._form, self._paths = form, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: Any) -> Any:
        return self._form.open(self._paths[number])


def format_of(path: Path) -> Format:
    """The format of a file, by its suffix.

    Raises:
        UserError: it is none of them.
    """
    for form in FORMATS.values():
        if path.suffix == form.suffix:
            return form
    known = ", ".join(form.suffix for form in FORMATS.values())
    raise UserError(f"{path}: no table's file; {known} would be right")


def text_widths(table: pa.Table) -> dict[str, int]:
    """Bytes of the longest value of each column of text; 1 at least."""
    widths = {}
    for field in table.schema:
        if pa.types.is_string(field.type):
            lengths = pc.binary_length(table[field.name])
            widths[field.name] = max(1, pc.max(lengths).as_py() or 0)
    return widths
