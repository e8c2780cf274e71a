"""Tables in HDF5: a dataset a column, ``embedding`` of shape (rows, width)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from astropt_ds.errors import UserError, one_line
from astropt_ds.extras import optional
from astropt_ds.table.arrays import KINDS, from_array, to_array
from astropt_ds.table.schema import FACTS, ID, embedding_field, embeddings_of

CHUNK_BYTES = 256_000  # of a dataset: what reading a single row costs
ORDER = "columns"  # attribute that keeps the order of the datasets


class HDF5:
    """See :class:`~astropt_ds.table.formats.Format`."""

    name, suffix = "hdf5", ".hdf5"

    def fit(self, schema: pa.Schema) -> pa.Schema:
        """The same, where h5py is installed."""
        optional("h5py", "--format hdf5")
        return schema

    @contextmanager
    def create(
        self, path: Path, schema: pa.Schema, rows: int, widths: Mapping[str, int]
    ) -> Iterator[HDF5Rows]:
        """A new file."""
        h5py = optional("h5py", "--format hdf5")
        shapes = embeddings_of(schema)
        with h5py.File(path, "w") as file:
            file.attrs["astropt_ds"] = (schema.metadata or {}).get(FACTS, b"{}").decode()
            file.attrs[ORDER] = json.dumps(schema.names)
            for field in schema:
                shape, text = shapes.get(field.name, ()), pa.types.is_string(field.type)
                if shape:
                    kind = field.type.value_type.to_pandas_dtype()
                elif text:
                    kind = h5py.string_dtype()
                else:
                    kind = KINDS[field.type]
                chunk = max(1, min(rows, CHUNK_BYTES // (8 * int(np.prod(shape)))))
                chunks = (chunk, *shape) if rows else None
                options = {"chunks": chunks, "fletcher32": chunks is not None and not text}
                file.create_dataset(field.name, (rows, *shape), kind, **options)
            yield HDF5Rows(file)

    def open(self, path: Path) -> StoredHDF5:
        """A file."""
        h5py = optional("h5py", str(path))
        try:
            return StoredHDF5(h5py.File(path))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)})") from None


class HDF5Rows:
    """A file in the making."""

    def __init__(self, file: Any) -> None:
        self._file, self._rows = file, 0

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        end = self._rows + len(table)
        for name in table.column_names:
            self._file[name][self._rows : end] = to_array(table, name)
        self._rows = end


class StoredHDF5:
    """A file, opened for reading."""

    def __init__(self, file: Any) -> None:
        self._file = file
        types = {np.dtype(kind): arrow for arrow, kind in KINDS.items()}
        fields = []
        for name in json.loads(file.attrs[ORDER]):
            dataset = file[name]
            if dataset.ndim > 1:
                fields.append(embedding_field(name, dataset.shape[1:], dataset.dtype.name))
            elif dataset.dtype.kind == "O":
                fields.append(pa.field(name, pa.string(), nullable=name != ID))
            else:
                fields.append(pa.field(name, types[dataset.dtype]))
        self.schema = pa.schema(fields, {FACTS: file.attrs["astropt_ds"].encode()})

    @property
    def rows(self) -> int:
        """In the file."""
        return len(self._file[ID])

    def read(self, columns: list[str] | None = None, rows: np.ndarray | None = None) -> pa.Table:
        """Some columns of some rows, in the order asked for; all if None."""
        names = self.schema.names if columns is None else columns
        fields = [self.schema.field(name) for name in names]
        arrays = []
        for field in fields:
            try:
                if rows is None:
                    values = self._file[field.name][:]
                else:  # HDF5 wants them in order, and once
                    sorted_rows, place = np.unique(rows, return_inverse=True)
                    values = self._file[field.name][sorted_rows][place]
            except OSError as error:
                name = self._file.filename
                raise UserError(f"{name}: cannot be read ({one_line(error)})") from None
            arrays.append(from_array(values, field))
        return pa.table(arrays, schema=pa.schema(fields, self.schema.metadata))
