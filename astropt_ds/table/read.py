"""Tables in Python: whole, or the rows of some ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from astropt_ds.errors import UserError
from astropt_ds.extras import optional
from astropt_ds.ids import text_of
from astropt_ds.table.arrays import to_array
from astropt_ds.table.formats import FORMATS, Files, format_of
from astropt_ds.table.index import find, load_index, make_index
from astropt_ds.table.manifest import TableManifest
from astropt_ds.table.schema import FACTS, ID, embeddings_of, facts_of

KINDS = ("pandas", "astropy", "numpy", "arrow")


def read_embeddings(
    path: str | Path,
    columns: Sequence[str] | str | None = None,
    ids: Iterable[Any] | str | bytes | int | None = None,
    kind: str = "pandas",
) -> Any:
    """Read a table of embeddings.

    Args:
        path: the folder that tools/embed.py wrote, or a file of tools/export_embeddings.py.
        columns: their names, or one; the id always comes along. All if None.
        ids: of the galaxies wanted, in the order wanted, or one. All if None.
        kind: of what is returned.

    Returns:
        ``pandas``: a DataFrame whose embeddings are arrays, one a cell, with what is said of the
        table in ``attrs``. ``astropy``: a Table whose embeddings are columns of shape (rows,
        width) or (rows, tokens, width), with that in ``meta``. ``numpy``: a structured array with
        fields of these shapes; what is missing is an empty text, NaN, or the smallest integer.
        ``arrow``: a Table whose embeddings are lists, flattened.

    Raises:
        UserError: there is no such table, column or id, or the table is not complete; a
            truth value is missing and numpy is asked for.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r}: one of {', '.join(KINDS)} would be right")
    path = Path(path)
    stored = open_parts(path)
    schema = schema_of(path, stored)
    names = chosen(path, schema, [columns] if isinstance(columns, str) else columns)
    if ids is None:
        table = pa.concat_tables([part.read(names) for part in stored])
    else:
        wanted: Iterable[Any] = [ids] if np.isscalar(ids) else ids  # type: ignore[assignment]
        table = _rows_of(path, stored, [text_of(i) for i in wanted], names)
    return _as_kind(table.replace_schema_metadata(schema.metadata), kind)


def schema_of(path: Path, stored: Files) -> pa.Schema:
    """The schema of a table, which says of itself what its manifest does: npy has no room for it.

    Raises:
        UserError: it is no table of embeddings.
    """
    schema: pa.Schema = stored[0].schema
    if ID not in schema.names:
        raise UserError(f"{path}: no table of embeddings: it has no column {ID!r}")
    if path.is_file():
        return schema
    return schema.with_metadata({FACTS: json.dumps(TableManifest.load(path).facts).encode()})


def chosen(path: Path, schema: pa.Schema, columns: Sequence[str] | None) -> list[str] | None:
    """The id and some columns of a table; None, for all, if none is named.

    Raises:
        UserError: it has no such column.
    """
    names = None if columns is None else list(dict.fromkeys([ID, *columns]))
    for name in names or ():
        if name not in schema.names:
            known = ", ".join(schema.names)
            raise UserError(f"{path}: has no column {name!r}; it has {known}")
    return names


def open_parts(path: Path) -> Files:
    """The files of a table, one at least.

    Raises:
        UserError: there is none, or not all of it.
    """
    if not path.exists():
        raise UserError(
            f"{path}: does not exist; the folder that tools/embed.py wrote would be right"
        )
    if path.is_file():
        return Files(format_of(path), [path])
    manifest = TableManifest.load(path)
    form = FORMATS.get(manifest.file_format)
    if form is None:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: has parts of {manifest.file_format!r}; {known} would be right")
    if not manifest.parts:
        raise UserError(f"{path}: holds no galaxies")
    return Files(form, [path / part.name for part in manifest.parts])


def _rows_of(path: Path, stored: Files, ids: list[str], names: list[str] | None) -> pa.Table:
    """The rows of some ids, in their order."""
    index = load_index(path) if path.is_dir() else make_index(stored)
    places, found = find(index, ids)
    parts, rows = found["part"].astype(np.int64), found["row"].astype(np.int64)
    tables, order = [], []
    for part in np.unique(parts).tolist():
        here = np.flatnonzero(parts == part)
        tables.append(stored[part].read(names, rows[here]))
        order.append(places[here])
    if not tables:
        tables, order = [stored[0].read(names, np.array([], np.int64))], [np.array([], np.int64)]
    table, place = pa.concat_tables(tables), np.concatenate(order)
    # another id may have the same hash
    right = np.array([ids[p] == i for p, i in zip(place, table[ID].to_pylist(), strict=True)], bool)
    kept = np.flatnonzero(right)
    missing = sorted(set(range(len(ids))) - set(place[kept].tolist()))
    if missing:
        raise UserError(
            f"{path}: holds no galaxy {ids[missing[0]]!r} ({len(missing)} of {len(ids)} ids are "
            "not in it); _failures.csv tells of those that have no embedding"
        )
    return table.take(pa.array(kept[np.argsort(place[kept], kind="stable")]))


def _as_kind(table: pa.Table, kind: str) -> Any:
    if kind == "arrow":
        return table
    shapes, facts = embeddings_of(table.schema), facts_of(table.schema)
    if kind == "pandas":
        # integers with gaps keep their digits: as floats they would lose those beyond 2 ** 53
        keep = {pa.int64(): pd.Int64Dtype()}.get
        plain = table.drop_columns(list(shapes))
        frame = plain.to_pandas(ignore_metadata=True, types_mapper=keep)
        for name, values in _arrays(table, shapes).items():
            frame[name] = list(values)
        frame = frame[table.column_names]
        frame.attrs = facts
        return frame
    arrays = _arrays(table, shapes)
    if kind == "astropy":
        for name in table.column_names:
            if name not in arrays:
                arrays[name] = table[name].to_numpy()
        return _astropy(table, arrays, facts)
    fields: list[Any] = []
    for name in table.column_names:
        values = to_array(table, name)
        if values.dtype.kind == "S":
            values = np.char.decode(values, "utf-8")
        arrays[name] = values
        fields.append((name, values.dtype, values.shape[1:]))
    rows = np.empty(len(table), fields)
    for name in table.column_names:
        rows[name] = arrays[name]
    return rows


def _arrays(table: pa.Table, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The embeddings of a table, (rows, *shape) each."""
    found = {}
    for name, shape in shapes.items():
        chunks = [chunk.flatten().to_numpy() for chunk in table[name].chunks]
        dtype = table.schema.field(name).type.value_type.to_pandas_dtype()
        flat = np.concatenate(chunks) if chunks else np.empty(0, dtype)
        found[name] = flat.reshape(len(table), *shape)
    return found


def _astropy(table: pa.Table, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> Any:
    astropy = optional("astropy.table", "kind='astropy'")
    result = astropy.Table(meta=facts)
    for name in table.column_names:
        column = table[name]
        missing = column.is_null().to_numpy()
        values = arrays[name]
        if missing.any() and not pa.types.is_floating(column.type):
            fill = "" if pa.types.is_string(column.type) else 0
            filled = column.fill_null(pa.scalar(fill).cast(column.type)).to_numpy()
            values = astropy.MaskedColumn(
                filled.astype(str) if fill == "" else filled, mask=missing
            )
        elif values.dtype == object:
            values = values.astype(str)
        result[name] = values
    return result
