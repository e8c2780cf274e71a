"""The cells of a survey's tables: ids as text, labels as JSON."""

from __future__ import annotations

import ast
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from astropt_ds.errors import UserError

ID_COLUMNS = ("id", "object_id", "dr8_id", "objid")  # where ids are looked for, the first first
PADDING = " \0"  # what FITS and HDF5 fill strings of a fixed width with
_BYTES_AS_TEXT = re.compile(r"""b'.*'|b".*\"""", re.DOTALL)


def text_of(value: Any) -> str:
    """An id or group as text, every digit and letter of it kept.

    Bytes are decoded and freed of padding at their end, whether they are bytes or were turned into
    "b'...'" on their way; 7.0 from a float column is 7.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and _BYTES_AS_TEXT.fullmatch(value):
        value = _literal_bytes(value)
    if isinstance(value, bytes):
        text = value.decode(errors="backslashreplace").rstrip(PADDING)
        return text_of(text) if _BYTES_AS_TEXT.fullmatch(text) else text
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _literal_bytes(text: str) -> bytes | str:
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):  # it only looks like it
        return text
    return value if isinstance(value, bytes) else text


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


def one_line(error: Exception) -> str:
    """What a library says is wrong, short enough for a message."""
    return " ".join(str(error).split())[:120] or type(error).__name__
