"""Columns as numpy arrays, for formats that know no missing values, and back.

What is missing is empty text, NaN, or the smallest integer; truth values must be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from astropt_ds.errors import UserError
from astropt_ds.table.schema import ID, embedding_field, embeddings_of

MISSING_INT = np.iinfo(np.int64).min
KINDS = {pa.float64(): "f8", pa.int64(): "i8", pa.bool_(): "?"}


def to_array(table: pa.Table, name: str) -> np.ndarray:
    """A column: (rows,), or (rows, *shape) of embeddings; text as UTF-8 bytes.

    Raises:
        UserError: a truth value is missing.
    """
    field, column = table.schema.field(name), table[name].combine_chunks()
    if shape := embeddings_of(table.schema).get(name):
        return column.flatten().to_numpy().reshape(len(table), *shape)
    if pa.types.is_string(field.type):
        return np.array(column.cast(pa.binary()).fill_null(b"").to_pylist(), dtype=bytes)
    if pa.types.is_boolean(field.type):
        if column.null_count:
            raise UserError(
                f"column {name}: a truth value is missing, for which this format has no word; "
                "parquet or arrow has, or --columns leaves it out"
            )
        return column.to_numpy(zero_copy_only=False)
    missing = np.nan if pa.types.is_floating(field.type) else MISSING_INT
    return column.fill_null(missing).to_numpy()


def from_array(values: np.ndarray, field: pa.Field) -> pa.Array:
    """The column that :func:`to_array` was given."""
    values = np.ascontiguousarray(values)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if pa.types.is_fixed_size_list(field.type):
        flat = pa.array(values.reshape(-1), field.type.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, field.type.list_size)
    if pa.types.is_string(field.type):
        text = pa.array(values.tolist(), pa.binary()).cast(pa.string())
        return pc.if_else(pc.equal(text, ""), None, text) if field.nullable else text
    mask = None
    if pa.types.is_floating(field.type):
        mask = np.isnan(values)
    elif pa.types.is_integer(field.type):
        mask = values == MISSING_INT
    return pa.array(values, field.type, mask=mask)


def record_dtype(schema: pa.Schema, widths: Mapping[str, int]) -> np.dtype[Any]:
    """The dtype of a row.

    Args:
        schema: of the table.
        widths: bytes of the longest value of each column of text.
    """
    shapes = embeddings_of(schema)
    fields: list[Any] = []
    for field in schema:
        if field.name in shapes:
            kind = "f2" if pa.types.is_float16(field.type.value_type) else "f4"
            fields.append((field.name, kind, shapes[field.name]))
        elif pa.types.is_string(field.type):
            fields.append((field.name, f"S{widths[field.name]}"))
        else:
            fields.append((field.name, KINDS[field.type]))
    return np.dtype(fields)


def schema_of(dtype: np.dtype[Any], metadata: dict[bytes, bytes] | None = None) -> pa.Schema:
    """The schema of the table whose rows are such."""
    types = {np.dtype(kind): arrow for arrow, kind in KINDS.items()}
    fields = []
    for name in dtype.names or ():
        base, shape = dtype[name].base, dtype[name].shape
        if shape:
            fields.append(embedding_field(name, shape, base.newbyteorder("=").name))
        elif base.kind == "S":
            fields.append(pa.field(name, pa.string(), nullable=name != ID))
        else:
            fields.append(pa.field(name, types[base.newbyteorder("=")]))
    return pa.schema(fields, metadata)


def to_records(table: pa.Table, dtype: np.dtype[Any]) -> np.ndarray:
    """The rows of a table, (rows,) of a dtype as :func:`record_dtype` has it, in any byte order."""
    records = np.empty(len(table), dtype)
    for name in table.column_names:
        records[name] = to_array(table, name)
    return records


def from_records(records: np.ndarray, schema: pa.Schema) -> pa.Table:
    """The table of some rows."""
    columns = [from_array(records[field.name], field) for field in schema]
    return pa.table(columns, schema=schema)
