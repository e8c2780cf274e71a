"""The columns that are carried along with embeddings: which, and of what type."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from astropt_ds.errors import UserError
from astropt_ds.ingest.catalogue import Catalogue, refuse_doubled
from astropt_ds.ingest.cells import plain
from astropt_ds.table.schema import ID

SKY = ("ra", "dec")  # degrees
SPLIT = "split"  # of shards, which a table says by itself


def carried(present: Iterable[str], asked: Sequence[str]) -> dict[str, str]:
    """Which of the columns that are present to carry along, with their names in the table.

    Those that are asked for, and the position on the sky, however its letters are written.
    """
    names = [name for name in present if name != ID]
    found = {}
    for axis in SKY:
        spelt = [name for name in names if name.lower() == axis]
        if spelt:
            found[axis if axis in spelt else spelt[0]] = axis
    return found | {name: name for name in names if name in asked and name not in found}


def settle(
    labels: Mapping[str, pa.DataType],
    beside: Beside | None,
    present: Sequence[str],
    asked: Sequence[str],
    where: str,
) -> dict[str, pa.DataType]:
    """The columns of a table: the labels of its galaxies, and a catalogue's.

    Args:
        labels: the types of those that are carried along, by their names in the table.
        beside: the catalogue, if any.
        present: the names of all labels.
        asked: columns that must be there.
        where: what the user calls the galaxies.

    Raises:
        UserError: one is not.
    """
    found = {**labels, **(beside.types() if beside else {})}
    known = dict.fromkeys([*present, *(beside.present if beside else ())])
    for name in asked:
        if name not in found and name != ID and name.lower() not in SKY:
            has = ", ".join(known) or "none"
            raise UserError(f"--columns {name}: {where} has no such column; it has {has}")
    return found


def add(cells: Sequence[dict[str, Any]], beside: Beside | None, ids: Sequence[str]) -> int:
    """Put what a catalogue knows of some galaxies beside, and before, what their labels say.

    Returns:
        How many it has no row of.
    """
    if beside is None:
        return 0
    unlisted = 0
    for known, more in zip(cells, beside.cells(ids), strict=True):
        unlisted += more is None
        known.update({name: value for name, value in (more or {}).items() if value is not None})
    return unlisted


def type_of(column: str, values: Iterable[Any]) -> pa.DataType:
    """The type of a column that has such values, as JSON holds them; nulls say nothing."""
    if column in SKY:
        return pa.float64()
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds and kinds <= {int, float}:
        return pa.float64()
    return pa.string()


def array(values: Sequence[Any], kind: pa.DataType, name: str, where: str) -> pa.Array:
    """A column.

    Raises:
        UserError: a value is of another kind than those that were seen first.
    """
    if pa.types.is_string(kind):
        return pa.array([None if v is None else _text(v) for v in values], kind)
    if pa.types.is_float64(kind):
        values = [float(v) if isinstance(v, (int, bool)) else v for v in values]
    if pa.types.is_int64(kind):
        values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"column {name}: {where} holds what is no {kind} as before ({reason}); "
            "--columns without it would be right"
        ) from None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class Beside:
    """The columns of a catalogue, by id.

    Args:
        catalogue: in memory.
        columns: those to take; all if none is named.
        file_column: names the images' files, and is not taken unless it is asked for.

    Attributes:
        present: the names of all its columns.

    Raises:
        UserError: the catalogue has an id twice.
    """

    def __init__(
        self, catalogue: Catalogue, columns: Sequence[str], file_column: str | None = None
    ) -> None:
        refuse_doubled(catalogue.ids, catalogue.id_column, catalogue.where)
        self._ids = pd.Index(catalogue.ids)
        self.present = catalogue.columns
        own = (catalogue.id_column, file_column or "file")
        all_but_own = [str(name) for name in catalogue.table if name not in own]
        names = carried(map(str, catalogue.table), columns or all_but_own)
        self._table = catalogue.table[list(names)].rename(columns=names)

    def types(self) -> dict[str, pa.DataType]:
        """Of the columns, by their names in the table."""
        return {str(name): type_of_cells(str(name), column) for name, column in self._table.items()}

    def cells(self, ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """What is known of each galaxy; None where the catalogue has no row."""
        places = self._ids.get_indexer(pd.Index(pd.Series(list(ids), dtype=object)))
        rows = self._table.iloc[places[places >= 0]].to_dict("records")
        found = iter({str(name): plain(value) for name, value in row.items()} for row in rows)
        return [None if place < 0 else next(found) for place in places]


def type_of_cells(name: str, column: pd.Series) -> pa.DataType:
    """The type of a column of a survey's table, by what the table says it is."""
    if name in SKY:
        return pa.float64()
    if pd.api.types.is_bool_dtype(column):
        return pa.bool_()
    if pd.api.types.is_integer_dtype(column):
        top = column.max()
        fits = top is pd.NA or math.isnan(top) or int(top) < 2**63
        return pa.int64() if fits else pa.string()
    if pd.api.types.is_float_dtype(column):
        return pa.float64()
    return pa.string()
