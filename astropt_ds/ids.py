"""Ids of galaxies as text, whatever a survey keeps them as."""

from __future__ import annotations

import ast
import re
from typing import Any

import numpy as np

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
