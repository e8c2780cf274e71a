"""Tables in numpy's format: one structured array, for ``np.load(path, mmap_mode="r")``.

``array["embedding"]`` has the shape (rows, width). What the table says of itself is in the manifest
alone: the format has no room for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from astropt_ds.errors import UserError, one_line
from astropt_ds.table.arrays import from_records, record_dtype, schema_of, to_records


class Npy:
    """See :class:`~astropt_ds.table.formats.Format`."""

    name, suffix = "npy", ".npy"

    def fit(self, schema: pa.Schema) -> pa.Schema:
        """The same."""
        return schema

    @contextmanager
    def create(
        self, path: Path, schema: pa.Schema, rows: int, widths: Mapping[str, int]
    ) -> Iterator[NpyRows]:
        """A new file."""
        dtype = record_dtype(schema, widths)
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (rows,),
        }
        with path.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, header)
            yield NpyRows(file, dtype)

    def open(self, path: Path) -> StoredNpy:
        """A file."""
        try:
            return StoredNpy(np.load(path, mmap_mode="r"))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)})") from None


class NpyRows:
    """A file in the making."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any]) -> None:
        self._file, self._dtype = file, dtype

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self._file.write(to_records(table, self._dtype).tobytes())


class StoredNpy:
    """A file, opened for reading."""

    def __init__(self, records: np.ndarray) -> None:
        self._records = records  # a view of the file
        self.schema = schema_of(records.dtype)

    @property
    def rows(self) -> int:
        """In the file."""
        return len(self._records)

    def read(self, columns: list[str] | None = None, rows: np.ndarray | None = None) -> pa.Table:
        """Some columns of some rows, in the order asked for; all if None."""
        schema = self.schema
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns], schema.metadata)
        return from_records(self._records if rows is None else self._records[rows], schema)
