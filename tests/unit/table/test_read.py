"""read_embeddings: whole tables and galaxies by id, in the user's own kind of table."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from astropt_ds import read_embeddings
from astropt_ds.errors import UserError
from astropt_ds.table import index
from astropt_ds.table.formats import FORMATS, text_widths
from astropt_ds.table.manifest import MANIFEST
from astropt_ds.table.schema import facts_of, table_schema
from tests.unit.table.tables import BIG, FACTS, galaxy_table, write_folder

IDS = [f"g{i * 7 % 50}" for i in range(50)]
TABLE = galaxy_table(IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tables") / "table", TABLE)


def test_arrow_is_the_table_that_was_written(folder):
    found = read_embeddings(folder, kind="arrow")
    assert found.equals(TABLE) and facts_of(found.schema) == FACTS


def test_pandas_has_an_array_a_cell_and_the_facts(folder):
    frame = read_embeddings(folder)
    assert list(frame) == TABLE.column_names and list(frame["id"]) == IDS
    expected = np.array(TABLE["embedding"].to_pylist(), np.float32)
    np.testing.assert_array_equal(np.stack(frame["embedding"]), expected)
    assert frame.attrs == FACTS
    # integers beside missing ones are still integers
    assert frame["number"][4] == BIG + 4 and frame["number"].isna().sum() == 10
    assert frame["ra"].isna().sum() == frame["kind"].isna().sum() == 10


def test_astropy_has_columns_of_arrays_and_masks_what_is_missing(folder):
    table = read_embeddings(folder, kind="astropy")
    assert table.colnames == TABLE.column_names and table.meta == FACTS
    assert table["embedding"].shape == (50, 4) and table["embedding"].dtype == np.float32
    assert list(table["id"]) == IDS and table["number"][4] == BIG + 4
    for name in ("number", "kind"):
        assert table[name].mask.tolist() == [v is None for v in TABLE[name].to_pylist()]
    assert np.isnan(table["ra"]).tolist() == [v is None for v in TABLE["ra"].to_pylist()]


def test_numpy_has_fields_of_arrays(folder):
    rows = read_embeddings(folder, kind="numpy")
    assert rows.dtype.names == tuple(TABLE.column_names) and rows["embedding"].shape == (50, 4)
    assert rows["id"].tolist() == IDS and rows["number"][4] == BIG + 4
    assert np.isnan(rows["ra"][2]) and rows["number"][3] == np.iinfo(np.int64).min
    assert rows["kind"][4] == ""


@pytest.mark.parametrize("kind", ["pandas", "astropy", "numpy"])
def test_patches_and_float16_keep_shape_and_type(tmp_path, kind):
    table = galaxy_table(IDS[:6], shape=(3, 2), dtype="float16")
    found = read_embeddings(write_folder(tmp_path / "t", table), kind=kind)["embedding"]
    values = np.stack(list(found))
    assert values.shape == (6, 3, 2) and values.dtype == np.float16
    assert values.reshape(6, 6).tolist() == table["embedding"].to_pylist()


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_folder_and_a_file_of_any_format_read_alike(tmp_path, name):
    path = tmp_path / f"table{FORMATS[name].suffix}"
    with FORMATS[name].create(path, TABLE.schema, 50, text_widths(TABLE)) as writer:
        writer.write(TABLE)
    for stored in (write_folder(tmp_path / "folder", TABLE, name=name), path):
        assert read_embeddings(stored, kind="arrow").equals(TABLE)
        some = read_embeddings(stored, ["number"], ["g3", "g49", "g3"], kind="arrow")
        rows = pa.array([IDS.index(i) for i in ("g3", "g49", "g3")])
        assert some.to_pylist() == TABLE.select(["id", "number"]).take(rows).to_pylist()
    assert read_embeddings(tmp_path / "folder").attrs == FACTS  # npy, too


def test_columns_come_in_the_order_asked_for_after_the_id(folder):
    assert list(read_embeddings(folder, ["embedding", "ra"])) == ["id", "embedding", "ra"]
    assert list(read_embeddings(folder, [], ["g1"])) == ["id"]


def test_ids_may_be_what_a_survey_keeps_them_as(tmp_path):
    stored = write_folder(tmp_path / "t", galaxy_table(["12", "7", "b"]))
    rows = read_embeddings(stored, ["embedding"], [7, 12.0, np.int64(12), b"b  ", "b'7'"])
    assert list(rows["id"]) == ["7", "12", "12", "b", "7"]
    assert [e[0] for e in rows["embedding"]] == [1, 0, 0, 2, 1]
    for ids in (pd.Series([7]), np.array([7]), 7, {7}):
        assert list(read_embeddings(stored, ids=ids)["id"]) == ["7"]


def test_no_ids_are_no_rows_of_the_same_columns(folder):
    for kind in ("pandas", "astropy", "numpy", "arrow"):
        rows = read_embeddings(folder, ids=[], kind=kind)
        assert len(rows) == 0
    assert rows.schema.names == TABLE.column_names


def test_ids_that_are_not_there_are_counted_and_one_is_named(folder):
    with pytest.raises(UserError, match=r"holds no galaxy 'x' \(2 of 3 ids are not in it\)"):
        read_embeddings(folder, ids=["g1", "x", "y"])


def test_another_galaxy_of_the_same_hash_is_never_returned(tmp_path, monkeypatch):
    def narrow(ids):
        return np.array([len(i) for i in ids], np.uint64)

    monkeypatch.setattr(index, "hash_ids", narrow)
    stored = write_folder(tmp_path / "t", TABLE)
    rows = read_embeddings(stored, ids=["g40", "g2", "g11"])
    assert [e[0] for e in rows["embedding"]] == [IDS.index(i) for i in ("g40", "g2", "g11")]
    with pytest.raises(UserError, match="holds no galaxy 'h40'"):
        read_embeddings(stored, ids=["h40"])


def test_single_galaxies_cost_the_row_groups_that_hold_them_and_no_more(tmp_path, monkeypatch):
    ids = [f"g{i}" for i in range(6000)]
    stored = write_folder(tmp_path / "t", galaxy_table(ids, width=64))  # 250 rows a row group
    read, inner = [], pq.ParquetFile.read_row_groups

    def watched(self, groups, *options):
        table = inner(self, groups, *options)
        read.append((groups, table["id"][0].as_py()))
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", watched)
    found = read_embeddings(stored, ids=["g5", "g3001", "g7"])
    assert [e[0] for e in found["embedding"]] == [5, 3001, 7]
    assert read == [([0], "g0"), ([4], "g3000")]


def test_pandas_and_pyarrow_read_the_folder_themselves(folder):
    frame = pd.read_parquet(folder)
    assert list(frame["id"]) == IDS and list(frame) == TABLE.column_names
    np.testing.assert_array_equal(np.stack(frame["embedding"])[:, 0], np.arange(50))
    found = ds.dataset(folder).to_table(columns=["id"], filter=ds.field("ra") > 6)
    assert found.num_rows == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"columns": ["dec"]}, "has no column 'dec'; it has id, ra, number, kind, embedding"),
        ({"kind": "polars"}, "kind='polars': one of pandas, astropy, numpy, arrow would be right"),
    ],
)
def test_what_cannot_be_had_is_told_in_a_line(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        read_embeddings(folder, **arguments)


def test_what_is_no_table_is_told(tmp_path, folder):
    with pytest.raises(UserError, match="nowhere: does not exist; the folder that tools/embed.py"):
        read_embeddings(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"_manifest.json: .*the same command finishes it"):
        read_embeddings(tmp_path)
    with pytest.raises(UserError, match=r"table.csv: no table's file; .parquet"):
        (tmp_path / "table.csv").touch()
        read_embeddings(tmp_path / "table.csv")
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other.parquet: no table of embeddings: it has no column"):
        read_embeddings(tmp_path / "other.parquet")
    manifest = (folder / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(manifest.replace('"parquet"', '"feather"'))
    with pytest.raises(UserError, match="has parts of 'feather'; parquet, fits"):
        read_embeddings(tmp_path)
    (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(UserError, match=r"part-000000.parquet: cannot be read"):
        read_embeddings(tmp_path)


def test_a_part_whose_pages_are_damaged_is_told_by_name(tmp_path):
    stored = write_folder(tmp_path / "t", TABLE)
    part = stored / "part-000001.parquet"
    data = bytearray(part.read_bytes())
    data[4:400] = bytes(396)
    part.write_bytes(data)
    with pytest.raises(UserError, match=r"part-000001.parquet: cannot be read"):
        read_embeddings(stored)


def test_missing_truth_values_are_masked_or_missing_and_refused_in_numpy(tmp_path):
    schema = table_schema({"merger": pa.bool_()}, {}, "float32", {})
    stored = write_folder(
        tmp_path / "t", pa.table([["a", "b"], pa.array([True, None])], schema=schema), 1
    )
    assert read_embeddings(stored)["merger"].tolist() == [True, None]
    assert read_embeddings(stored, kind="astropy")["merger"].mask.tolist() == [False, True]
    with pytest.raises(UserError, match="column merger: a truth value is missing"):
        read_embeddings(stored, kind="numpy")
