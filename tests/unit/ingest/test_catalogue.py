import numpy as np
import pandas as pd
import pytest
from astropy.table import MaskedColumn, Table
from hypothesis import given
from hypothesis import strategies as st

from astropt_ds.errors import UserError
from astropt_ds.ingest.catalogue import read_catalogue

BIG = 587736915678593357  # more digits than a float has


def read(path, named=None, wanted=lambda name: True, text=()):
    return read_catalogue(path, named, "id-column", wanted, text)


def table():
    gaps = MaskedColumn([BIG + 1, 0, 3], mask=[False, True, False], dtype="int64")
    return Table(
        {
            "object_id": np.array([BIG, BIG + 1, BIG + 2]),
            "name": np.array(["NGC 1", "b", "c"]),
            "targetid": gaps,
            "mag": np.array([1.5, np.nan, 3.0]),
        }
    )


def write_parquet_folder(path):
    path.mkdir()
    frame = table().to_pandas()
    frame[:1].to_parquet(path / "a.parquet")
    frame[1:].set_index("name").to_parquet(path / "b.parquet")
    (path / "README.md").write_text("as the hub has it\n")


FORMATS = {
    "t.csv": lambda path: table().to_pandas().to_csv(path, index=False),
    "t.parquet": lambda path: table().to_pandas().to_parquet(path),
    "folder": write_parquet_folder,
    "t.fits": lambda path: table().write(path),
    "t.fits.gz": lambda path: table().write(path),
    "t.vot": lambda path: table().write(path, format="votable"),
    "t.xml": lambda path: table().write(path, format="votable"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_keeps_64_bit_ids_and_says_the_same(tmp_path, name):
    FORMATS[name](tmp_path / name)
    catalogue = read(tmp_path / name)
    assert catalogue.id_column == "object_id"
    assert list(catalogue.ids) == [str(BIG), str(BIG + 1), str(BIG + 2)]
    found = catalogue.table
    assert list(found["name"]) == ["NGC 1", "b", "c"]
    assert [None if pd.isna(v) else int(v) for v in found["targetid"]] == [BIG + 1, None, 3]
    assert list(found.query("mag > 2 and name == 'c'").index) == [2]
    assert list(found.query("targetid > 2").index) == [0, 2]


def test_byte_strings_of_fits_are_text_without_padding(tmp_path):
    rows = Table({"id": np.array([b"a   ", b"bc"]), "vector": np.arange(4.0).reshape(2, 2)})
    rows.write(tmp_path / "t.fits")
    catalogue = read(tmp_path / "t.fits")
    assert list(catalogue.ids) == ["a", "bc"]
    assert list(catalogue.table["vector"]) == [[0, 1], [2, 3]]


IDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20)


@given(st.lists(IDS, min_size=1, max_size=5, unique=True))
def test_any_text_is_an_id_in_csv_and_in_parquet(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("ids")
    ids = [*(i for i in ids if not i.startswith("b")), "NA", "null", "007", "1e5", "a/b.c"]
    frame = pd.DataFrame({"id": list(dict.fromkeys(ids)), "x": 1})
    frame.to_csv(folder / "t.csv", index=False)
    frame.to_parquet(folder / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        assert list(read(folder / name).ids) == list(frame["id"])


def test_only_the_columns_wanted_are_read(tmp_path):
    for name, write in FORMATS.items():
        write(tmp_path / name)
        catalogue = read(tmp_path / name, wanted=lambda column: column == "mag")
        assert list(catalogue.table) == ["object_id", "mag"], name
        assert catalogue.columns == ["object_id", "name", "targetid", "mag"], name


def test_the_row_beside_an_id_is_found_or_none_is(tmp_path):
    pd.DataFrame({"id": ["a", "b"]}).to_csv(tmp_path / "t.csv", index=False)
    catalogue = read(tmp_path / "t.csv")
    assert list(catalogue.beside(pd.Series(["b", "x", "a"]))) == [1, -1, 0]
    with pytest.raises(UserError, match=r"none of the images' ids, as 'a' there and 'x' here"):
        catalogue.beside(pd.Series(["x"]))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", "id,x\na,1\n,2\n", "column 'id' is empty in 1 of 2 rows, row 1 for one"),
        ("t.csv", "name,x\na,1\n", "t.csv: has none of the columns id, .* it has name, x"),
        ("t.csv", "", "--catalogue .*t.csv: cannot be read"),
        ("t.parquet", "id\n", "--catalogue .*t.parquet: cannot be read"),
        ("t.fits", "id\n", "--catalogue .*t.fits: cannot be read"),
        ("t.vot", "id\n", "--catalogue .*t.vot: cannot be read"),
        ("none.csv", None, "--catalogue .*none.csv: cannot be read"),
        ("none.fits", None, "--catalogue .*none.fits: cannot be read"),
    ],
)
def test_a_bad_catalogue_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
