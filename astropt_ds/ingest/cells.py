"""The cells of a survey's tables: columns of ids, labels as JSON."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from astropt_ds.errors import UserError
from astropt_ds.ids import PADDING, text_of

ID_COLUMNS = ("id", "object_id", "dr8_id", "objid")  # where ids are looked for, the first first


def key_of(identifier: str) -> str:
    """An id as a WebDataset key: reversible, and free of dots and slashes."""
    return urllib.parse.quote(identifier, safe="").replace(".", "%2E")


def id_column(
    named: str | None,
    columns: Iterable[str],
    option: str,
    where: str,
    usual: Sequence[str] = ID_COLUMNS,
) -> str:
    """The column of the ids: the one that is named, or else the first of the usual ones.

    Raises:
        UserError: there is no such column in ``where``.
    """
    columns = list(columns)
    for column in (named,) if named else usual:
        if column in columns:
            return column
    has = f"it has {', '.join(columns)}"
    if named:
        raise UserError(f"--{option} {named}: {where} has no such column; {has}")
    raise UserError(f"{where}: has none of the columns {', '.join(usual)}; --{option}: {has}")


def texts(column: pd.Series, name: str, where: str) -> pd.Series:
    """A column of ids as text.

    Raises:
        UserError: some are empty.
    """
    missing = column.isna()
    if not missing.any():
        column = column.astype(object).map(text_of)
        missing = column == ""
    if count := int(missing.sum()):
        first = int(missing.to_numpy().argmax())
        raise UserError(
            f"{where}: column {name!r} is empty in {count} of {len(column)} rows, row {first} for "
            "one, counted from 0; an id for each would be right"
        )
    return column


def labels_of(cells: Mapping[Any, Any], id_column: str) -> dict[str, Any]:
    """A row of a table as labels. The id of a sample is what ``id_column`` holds: another column
    that is called id becomes ``catalogue_id``."""
    labels = {str(name): plain(value) for name, value in cells.items()}
    if "id" in labels and id_column != "id":
        labels["catalogue_id"] = labels.pop("id")
    return labels


def plain(value: Any) -> Any:
    """A cell as JSON holds it; missing and non-finite values become null."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        return value.decode(errors="replace").rstrip(PADDING)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return None if value is pd.NaT or value is pd.NA else str(value)
