"""Ids come through every kind of input as they are, byte for byte."""

import itertools

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from astropy.table import Table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from astropt_ds.ids import text_of
from tests.conftest import blob
from tests.unit.ingest.shards import made

JPEG = simplejpeg.encode_jpeg(blob(0, 16), quality=90)
NUMBER = itertools.count()


def is_plain(text):
    """Neither padded at its end nor bytes that became text: those are tested in test_cells."""
    return text.rstrip(" \0") == text and text_of(text) == text


LETTERS = st.characters(codec="utf-8", exclude_categories=["Cc"])
ANY = st.text(st.one_of(st.sampled_from("./%b'\" \\0"), LETTERS), min_size=1, max_size=12)
IDS = st.lists(ANY.filter(is_plain), min_size=1, max_size=4, unique=True)
ASCII = st.lists(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12).filter(
        is_plain
    ),
    **{"min_size": 1, "max_size": 4, "unique": True},
)
few = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def new(tmp_path):
    """A new empty folder at each call: an example of hypothesis each."""

    def folder():
        path = tmp_path / str(next(NUMBER))
        path.mkdir()
        return path

    return folder


@few
@given(IDS)
def test_of_parquet_as_text_bytes_and_text_of_bytes(new, ids):
    for written in (ids, [i.encode() for i in ids], [str(i.encode()) for i in ids]):
        folder = new()
        table = pa.table({"image": [JPEG] * len(ids), "id": written})
        pq.write_table(table, folder / "t.parquet")
        assert set(made(folder / "s", parquet=(folder / "t.parquet",))) == set(ids)


@few
@given(IDS)
def test_of_hdf5_as_padded_and_as_variable_strings(new, ids):
    written = np.array([i.encode() for i in ids])
    for dtype in (f"S{written.itemsize + 3}", h5py.string_dtype()):
        folder = new()
        with h5py.File(folder / "t.h5", "w") as file:
            file["images"] = np.ones((len(ids), 3, 16, 16), np.float32)
            cells = written.astype(dtype if isinstance(dtype, str) else object)
            file.create_dataset("object_id", data=cells, dtype=dtype)
        assert set(made(folder / "s", hdf5=(folder / "t.h5",))) == set(ids)


def named(folder, ids, write):
    """The ids in the shards of images that a catalogue names."""
    (folder / "x.jpg").write_bytes(JPEG)
    write(pd.DataFrame({"id": ids, "file": "x.jpg"}))
    (catalogue,) = (path for path in folder.iterdir() if path.stem == "t")
    return set(made(folder / "s", images=folder, catalogue=catalogue))


@few
@given(IDS)
def test_of_csv_and_parquet_catalogues(new, ids):
    a, b = new(), new()
    assert named(a, ids, lambda table: table.to_csv(a / "t.csv", index=False)) == set(ids)
    assert named(b, ids, lambda table: table.to_parquet(b / "t.parquet")) == set(ids)


@few
@given(ASCII)
def test_of_fits_and_votable_catalogues(new, ids):
    for name in ("t.fits", "t.vot"):
        folder = new()
        kind = "votable" if name == "t.vot" else "fits"

        def write(table, path=folder / name, kind=kind):
            Table.from_pandas(table).write(path, format=kind)

        assert named(folder, ids, write) == set(ids)


@few
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4, unique=True))
def test_of_64_bit_integers_everywhere(new, numbers):
    ids = set(map(str, numbers))
    folder = new()
    pq.write_table(pa.table({"image": [JPEG] * len(ids), "objid": numbers}), folder / "t.parquet")
    assert set(made(folder / "a", parquet=(folder / "t.parquet",))) == ids
    with h5py.File(folder / "t.h5", "w") as file:
        file["images"] = np.ones((len(ids), 3, 16, 16), np.float32)
        file["inds"] = numbers
    assert set(made(folder / "b", hdf5=(folder / "t.h5",))) == ids
    for name in ("csv", "fits"):
        here = new()

        def write(table, path=here / f"t.{name}", name=name):
            if name == "csv":
                table.to_csv(path, index=False)
            else:
                Table.from_pandas(table).write(path)

        assert named(here, numbers, write) == ids


def test_that_begin_with_a_blank_are_others_than_those_without(new):
    folder = new()
    table = pa.table({"image": [JPEG] * 2, "id": [b" 7", b"7"]})
    pq.write_table(table, folder / "t.parquet")
    assert set(made(folder / "s", parquet=(folder / "t.parquet",))) == {" 7", "7"}
