"""Tables in Parquet: zstd, row groups small enough to read single rows, large enough to scan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from astropt_ds.errors import UserError
from astropt_ds.table.schema import embeddings_of

GROUP_BYTES = 64_000  # of embeddings in a row group: what reading a single row costs


class Parquet:
    """See :class:`~astropt_ds.table.formats.Format`."""

    name, suffix = "parquet", ".parquet"

    def check(self, schema: pa.Schema) -> None:
        """Any table fits."""

    @contextmanager
    def create(
        self, path: Path, schema: pa.Schema, rows: int, widths: Mapping[str, int]
    ) -> Iterator[ParquetRows]:
        """A new file."""
        embeddings = embeddings_of(schema)
        row_bytes = sum(
            schema.field(name).type.list_size * schema.field(name).type.value_type.bit_width // 8
            for name in embeddings
        )
        texts = [f.name for f in schema if f.name not in embeddings and f.name != "id"]
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=texts) as writer:
            yield ParquetRows(writer, max(1, GROUP_BYTES // max(1, row_bytes)))

    def open(self, path: Path) -> StoredParquet:
        """A file."""
        try:
            return StoredParquet(pq.ParquetFile(path))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


class ParquetRows:
    """A file in the making."""

    def __init__(self, writer: pq.ParquetWriter, group: int) -> None:
        self._writer, self._group = writer, group

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self._writer.write_table(table, row_group_size=self._group)


class StoredParquet:
    """A file, opened for reading."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *counts])

    @property
    def schema(self) -> pa.Schema:
        """Of the table that was written."""
        return self._file.schema_arrow

    @property
    def rows(self) -> int:
        """In the file."""
        return int(self._starts[-1])

    def read(self, columns: list[str] | None = None, rows: np.ndarray | None = None) -> pa.Table:
        """Some columns of some rows, in the order asked for; all if None."""
        if rows is None:
            return self._file.read(columns)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        wanted, place = np.unique(groups, return_inverse=True)
        if not len(wanted):
            return self._file.schema_arrow.empty_table().select(columns or self.schema.names)
        table = self._file.read_row_groups(wanted.tolist(), columns)
        # where each group begins in what was read
        begins = np.cumsum([0, *np.diff(self._starts)[wanted]])[:-1]
        return table.take(pa.array(begins[place] + rows - self._starts[groups]))
