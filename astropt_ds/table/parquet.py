"""Tables in Parquet: zstd, row groups small enough to read single rows, large enough to scan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from astropt_ds.errors import UserError, one_line
from astropt_ds.table.schema import ID, row_bytes

GROUP_BYTES = 64_000  # of embeddings in a row group: what reading a single row costs


class Parquet:
    """See :class:`~astropt_ds.table.formats.Format`."""

    name, suffix = "parquet", ".parquet"

    def fit(self, schema: pa.Schema) -> pa.Schema:
        """The same."""
        return schema

    @contextmanager
    def create(
        self, path: Path, schema: pa.Schema, rows: int, widths: Mapping[str, int]
    ) -> Iterator[ParquetRows]:
        """A new file."""
        texts = [f.name for f in schema if pa.types.is_string(f.type) and f.name != ID]
        with pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=texts, write_page_checksum=True
        ) as writer:
            yield ParquetRows(writer, max(1, GROUP_BYTES // max(1, row_bytes(schema))))

    def open(self, path: Path) -> StoredParquet:
        """A file."""
        try:
            return StoredParquet(path, pq.ParquetFile(path, page_checksum_verification=True))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)})") from None


class ParquetRows:
    """A file in the making."""

    def __init__(self, writer: pq.ParquetWriter, group: int) -> None:
        self._writer, self._group = writer, group

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self._writer.write_table(table, row_group_size=self._group)


class StoredParquet:
    """A file, opened for reading."""

    def __init__(self, path: Path, file: pq.ParquetFile) -> None:
        self._path, self._file = path, file
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *counts])
        self.schema: pa.Schema = file.schema_arrow  # of the table that was written

    @property
    def rows(self) -> int:
        """In the file."""
        return int(self._starts[-1])

    def read(self, columns: list[str] | None = None, rows: np.ndarray | None = None) -> pa.Table:
        """Some columns of some rows, in the order asked for; all if None.

        Raises:
            UserError: the file is damaged.
        """
        names = self.schema.names if columns is None else columns
        try:
            if rows is None:
                return self._file.read(names).select(names)
            groups = np.searchsorted(self._starts, rows, side="right") - 1
            wanted, place = np.unique(groups, return_inverse=True)
            table = self._file.read_row_groups(wanted.tolist(), names).select(names)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self._path}: cannot be read ({one_line(error)})") from None
        # where each group begins in what was read
        begins = np.cumsum([0, *np.diff(self._starts)[wanted]])[:-1]
        return table.take(pa.array(begins[place] + rows - self._starts[groups], pa.int64()))
