"""Tables in FITS: a binary table that astropy and TOPCAT open.

Its header names the model, layers, pooling and tokens; ``FACTS`` holds all that the table says of
itself, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from astropt_ds.errors import UserError, one_line
from astropt_ds.extras import optional
from astropt_ds.table.arrays import MISSING_INT, from_array, record_dtype, schema_of, to_array
from astropt_ds.table.schema import FACTS, embedding_field, embeddings_of, facts_of

BLOCK = 2880  # bytes, of which a FITS file has a whole number
TOLD = {"model": "MODEL", "layers": "LAYERS", "pooling": "POOLING", "tokens": "TOKENS"}
TRUE, FALSE = ord("T"), ord("F")
UNITS = {"ra": "deg", "dec": "deg"}


class Fits:
    """See :class:`~astropt_ds.table.formats.Format`."""

    name, suffix = "fits", ".fits"

    def fit(self, schema: pa.Schema) -> pa.Schema:
        """With float32 in place of float16, which FITS has not."""
        optional("astropy.io.fits", "--format fits")
        shapes = embeddings_of(schema)
        fields = [
            embedding_field(field.name, shapes[field.name], "float32")
            if field.name in shapes
            else field
            for field in schema
        ]
        return pa.schema(fields, schema.metadata)

    @contextmanager
    def create(
        self, path: Path, schema: pa.Schema, rows: int, widths: Mapping[str, int]
    ) -> Iterator[FitsRows]:
        """A new file."""
        fits = optional("astropy.io.fits", "--format fits")
        dtype = _stored_dtype(record_dtype(schema, widths))
        columns = [_column(fits, name, dtype, schema) for name in schema.names]
        table = fits.BinTableHDU.from_columns(columns, nrows=0, name="EMBEDDINGS")
        table.header["NAXIS2"] = rows
        facts = facts_of(schema)
        for fact, keyword in TOLD.items():
            if fact in facts:
                value = facts[fact]
                table.header[keyword] = value if isinstance(value, int | str) else str(value)
        table.header["FACTS"] = json.dumps(facts)
        with path.open("wb") as file:
            file.write(fits.PrimaryHDU().header.tostring().encode())
            file.write(table.header.tostring().encode())
            yield FitsRows(file, dtype)
            file.write(bytes(-file.tell() % BLOCK))

    def open(self, path: Path) -> StoredFits:
        """A file."""
        fits = optional("astropy.io.fits", str(path))
        try:
            with fits.open(path, memmap=True) as hdus:
                table = hdus["EMBEDDINGS"]
                place, header = table.fileinfo()["datLoc"], table.header
                dtype = table.columns.dtype.newbyteorder(">")
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
        rows = int(header["NAXIS2"])
        if path.stat().st_size < place + rows * dtype.itemsize:
            raise UserError(f"{path}: cannot be read (ends before its {rows} rows do)")
        records = np.memmap(path, dtype, "r", place, (rows,)) if rows else np.empty(0, dtype)
        return StoredFits(records, header)


class FitsRows:
    """A file in the making."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any]) -> None:
        self._file, self._dtype = file, dtype

    def write(self, table: pa.Table) -> None:
        """Append rows.

        Raises:
            UserError: a text is not ASCII.
        """
        records = np.empty(len(table), self._dtype)
        for name in table.column_names:
            values = to_array(table, name)
            if values.dtype.kind == "S" and not all(map(bytes.isascii, values.tolist())):
                text = next(v for v in values.tolist() if not v.isascii()).decode()
                raise UserError(f"column {name}: FITS holds ASCII alone, not {text!r}")
            records[name] = np.where(values, TRUE, FALSE) if values.dtype.kind == "b" else values
        self._file.write(records.tobytes())


class StoredFits:
    """A file, opened for reading."""

    def __init__(self, records: np.ndarray, header: Any) -> None:
        self._records = records
        logical = {header[f"TTYPE{n}"] for n in _numbers(header) if header[f"TFORM{n}"] == "L"}
        fields: list[Any] = [
            (name, "?" if name in logical else records.dtype[name])
            for name in records.dtype.names or ()
        ]
        metadata = {FACTS: header.get("FACTS", "{}").encode()}
        self.schema = schema_of(np.dtype(fields), metadata)

    @property
    def rows(self) -> int:
        """In the file."""
        return len(self._records)

    def read(self, columns: list[str] | None = None, rows: np.ndarray | None = None) -> pa.Table:
        """Some columns of some rows, in the order asked for; all if None."""
        names = self.schema.names if columns is None else columns
        fields = [self.schema.field(name) for name in names]
        arrays = []
        for field in fields:
            values = self._records[field.name]
            values = values if rows is None else values[rows]
            values = values == TRUE if pa.types.is_boolean(field.type) else values
            arrays.append(from_array(values, field))
        return pa.table(arrays, schema=pa.schema(fields, self.schema.metadata))


def _stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Big-endian, with truth values as letters."""
    fields = [
        (name, "i1" if dtype[name].kind == "b" else dtype[name]) for name in dtype.names or ()
    ]
    return np.dtype(fields).newbyteorder(">")


def _column(fits: Any, name: str, dtype: np.dtype[Any], schema: pa.Schema) -> Any:
    base, shape = dtype[name].base, dtype[name].shape
    if shape:
        size = int(np.prod(shape))
        dim = f"({','.join(map(str, reversed(shape)))})" if len(shape) > 1 else None
        return fits.Column(name, f"{size}E", dim=dim)
    if base.kind == "S":
        return fits.Column(name, f"{base.itemsize}A")
    if pa.types.is_boolean(schema.field(name).type):
        return fits.Column(name, "L")
    if base.kind == "i":
        return fits.Column(name, "K", null=int(MISSING_INT))
    return fits.Column(name, "D", unit=UNITS.get(name))


def _numbers(header: Any) -> range:
    return range(1, header["TFIELDS"] + 1)
