"""Tables in Arrow's IPC format: mapped into memory, read without being parsed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from astropt_ds.errors import UserError, one_line


class Arrow:
    """See :class:`~astropt_ds.table.formats.Format`."""

    name, suffix = "arrow", ".arrow"

    def fit(self, schema: pa.Schema) -> pa.Schema:
        """The same."""
        return schema

    @contextmanager
    def create(
        self, path: Path, schema: pa.Schema, rows: int, widths: Mapping[str, int]
    ) -> Iterator[pa.RecordBatchFileWriter]:
        """A new file."""
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            yield writer

    def open(self, path: Path) -> StoredArrow:
        """A file."""
        try:
            return StoredArrow(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)})") from None


class StoredArrow:
    """A file, opened for reading."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table  # of views into the file

    @property
    def schema(self) -> pa.Schema:
        """Of the table that was written."""
        return self._table.schema

    @property
    def rows(self) -> int:
        """In the file."""
        return self._table.num_rows

    def read(self, columns: list[str] | None = None, rows: np.ndarray | None = None) -> pa.Table:
        """Some columns of some rows, in the order asked for; all if None."""
        table = self._table if columns is None else self._table.select(columns)
        return table if rows is None else table.take(pa.array(rows, pa.int64()))
