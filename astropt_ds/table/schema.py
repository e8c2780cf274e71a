"""The columns of a table: the id, what is carried along, and the embeddings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from astropt_ds.errors import UserError

ID = "id"
FACTS, SHAPE = b"astropt_ds", b"shape"  # keys of a schema's and of a field's metadata
TYPES = (pa.string(), pa.float64(), pa.int64(), pa.bool_())  # of columns carried along
DTYPES = {"float32": pa.float32(), "float16": pa.float16()}


def table_schema(
    columns: Mapping[str, pa.DataType],
    embeddings: Mapping[str, tuple[int, ...]],
    dtype: str,
    facts: Mapping[str, Any],
) -> pa.Schema:
    """The schema of a table.

    Args:
        columns: that are carried along: string, float64, int64 or bool; values may be missing.
        embeddings: the shape of each. They are lists of a fixed size, flattened.
        dtype: of embeddings: a name in DTYPES.
        facts: what the table says of itself, as JSON holds it.
    """
    fields = [pa.field(ID, pa.string(), nullable=False)]
    fields += [pa.field(name, kind) for name, kind in columns.items()]
    fields += [embedding_field(name, shape, dtype) for name, shape in embeddings.items()]
    return pa.schema(fields, {FACTS: json.dumps(dict(facts)).encode()})


def embedding_field(name: str, shape: tuple[int, ...], dtype: str) -> pa.Field:
    """A column of embeddings of some shape: lists of a fixed size, flattened."""
    metadata = {SHAPE: json.dumps(list(shape)).encode()}
    kind = pa.list_(DTYPES[dtype], math.prod(shape))
    return pa.field(name, kind, nullable=False, metadata=metadata)


def embeddings_of(schema: pa.Schema) -> dict[str, tuple[int, ...]]:
    """The shape of each embedding by the name of its column."""
    return {
        field.name: tuple(json.loads(field.metadata[SHAPE]))
        for field in schema
        if field.metadata and SHAPE in field.metadata
    }


def facts_of(schema: pa.Schema) -> dict[str, Any]:
    """What a table says of itself."""
    return dict(json.loads((schema.metadata or {}).get(FACTS, b"{}")))


def row_bytes(schema: pa.Schema) -> int:
    """Of the embeddings of a row."""
    types = [schema.field(name).type for name in embeddings_of(schema)]
    return sum(kind.list_size * kind.value_type.bit_width // 8 for kind in types)


def check_types(path: Path, schema: pa.Schema) -> None:
    """See that a table has columns of the kinds that tables of embeddings have.

    Raises:
        UserError: it has others.
    """
    shapes = embeddings_of(schema)
    for field in schema:
        if field.name not in shapes and field.type not in TYPES:
            kinds = ", ".join(map(str, TYPES))
            raise UserError(
                f"{path}: column {field.name!r} holds {field.type}; embeddings, {kinds} would be "
                "right, or --columns without it"
            )


def recast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with the types of a schema of the same columns."""
    columns = []
    for field in schema:
        column = table[field.name].combine_chunks()
        if pa.types.is_fixed_size_list(field.type) and column.type != field.type:
            values = column.flatten().cast(field.type.value_type)
            column = pa.FixedSizeListArray.from_arrays(values, field.type.list_size)
        columns.append(column)
    return pa.table(columns, schema=schema)
