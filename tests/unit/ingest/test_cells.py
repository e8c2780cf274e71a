from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astropt_ds.errors import UserError
from astropt_ds.ids import text_of
from astropt_ds.ingest.cells import id_column, key_of, labels_of, plain

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


@given(TEXT)
def test_a_key_is_reversible_and_safe_in_a_tar(identifier):
    key = key_of(identifier)
    assert key.isascii() and "." not in key and "/" not in key
    assert unquote(key) == identifier


@given(TEXT)
def test_an_id_that_was_bytes_is_the_text_that_it_was(identifier):
    identifier = identifier.strip(" \0") or "x"
    if text_of(identifier) != identifier:  # looks like b'...' itself
        return
    data = identifier.encode()
    assert text_of(data) == identifier
    assert text_of(np.bytes_(data.ljust(50))) == identifier
    assert text_of(str(data)) == identifier


@given(st.integers(-(2**63), 2**63 - 1))
def test_integers_keep_every_digit(number):
    assert text_of(number) == text_of(np.int64(number)) == str(number)


@pytest.mark.parametrize(
    "value, text",
    [
        ("b'abc'", "abc"),
        ('b"it\'s"', "it's"),
        ("b'587736915678593357'", "587736915678593357"),
        (b"abc  \0\0", "abc"),
        ("b'abc", "b'abc"),
        ("b'a' or b'b'", "b'a' or b'b'"),
        ("b", "b"),
        (" abc ", " abc "),
        (7.0, "7"),
        (np.float32(7), "7"),
        (7.5, "7.5"),
        ("7.0", "7.0"),
        ("007", "007"),
    ],
)
def test_ids_become_the_text_that_was_meant(value, text):
    assert text_of(value) == text


@pytest.mark.parametrize(
    "cell, label",
    [
        (np.float32("nan"), None),
        (float("inf"), None),
        (pd.NA, None),
        (pd.NaT, None),
        (np.int64(2**62 + 1), 2**62 + 1),
        (b"ab  ", "ab"),
        (np.array([1.0, np.nan]), [1.0, None]),
        ({"a": [np.True_]}, {"a": [True]}),
        (pd.Timestamp("2026-01-01"), "2026-01-01 00:00:00"),
    ],
)
def test_cells_of_any_type_become_json(cell, label):
    assert plain(cell) == label


def test_another_column_called_id_is_kept_beside_the_id():
    assert labels_of({"id": 3, "objid": 4}, "objid") == {"catalogue_id": 3, "objid": 4}
    assert labels_of({"id": 3, "objid": 4}, "id") == {"id": 3, "objid": 4}


def test_the_usual_columns_of_ids_are_found_in_their_order():
    assert id_column(None, ["ra", "objid", "dr8_id"], "id-column", "t") == "dr8_id"
    assert id_column("ra", ["ra", "id"], "id-column", "t") == "ra"
    with pytest.raises(UserError, match="t: .* id, object_id, dr8_id, objid; --id-column: it has"):
        id_column(None, ["ra", "dec"], "id-column", "t")
