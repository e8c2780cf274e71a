"""What is read back from a table's file is what was written, in every format."""

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from astropy.io import fits
from astropy.table import Table

from astropt_ds.errors import UserError
from astropt_ds.table.formats import FORMATS, format_of, text_widths
from astropt_ds.table.schema import embeddings_of, facts_of, table_schema

FACTS = {"model": "ab" * 32, "layers": [2], "pooling": "mean", "tokens": 64, "note": "x" * 400}
COLUMNS = {
    "split": pa.string(),
    "ra": pa.float64(),
    "number": pa.int64(),
    "merger": pa.bool_(),
}


def table(rows=500, dtype="float32", missing=True, unicode=False, **shapes):
    rng = np.random.default_rng(rows)
    shapes = shapes or {"embedding": (24,)}
    schema = table_schema(COLUMNS, shapes, dtype, FACTS)
    gap = lambda values: [None if missing and i % 7 == 3 else v for i, v in enumerate(values)]  # noqa: E731
    name = "Größe-{}" if unicode else "galaxy/{}"
    columns = [
        [name.format(i * 37 % 1009) for i in range(rows)],
        gap([("train", "val")[i % 2] for i in range(rows)]),
        gap(rng.uniform(0, 360, rows).tolist()),
        gap((rng.integers(-(2**62), 2**62, rows)).tolist()),
        rng.random(rows) < 0.5,
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=False)]
    for shape in shapes.values():
        flat = rng.normal(size=(rows, *shape)).astype(dtype).reshape(-1)
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), int(np.prod(shape))))
    return pa.table(arrays, schema=schema)


def written(path, form, content, parts=3):
    """Written in several pieces."""
    assert form.fit(content.schema).equals(content.schema)
    rows = content.num_rows
    with form.create(path, content.schema, rows, text_widths(content)) as writer:
        cuts = np.linspace(0, rows, parts + 1).astype(int)
        for first, last in pairwise(cuts):
            writer.write(content.slice(first, last - first))
    return form.open(path)


@pytest.fixture(params=sorted(FORMATS))
def form(request):
    return FORMATS[request.param]


@pytest.mark.parametrize("rows", [500, 1, 0])
def test_a_table_survives_with_its_gaps_and_facts(form, tmp_path, rows):
    content = table(rows)
    stored = written(tmp_path / f"t{form.suffix}", form, content)
    assert stored.rows == rows
    assert stored.read().to_pydict() == content.to_pydict()
    assert embeddings_of(stored.schema) == {"embedding": (24,)}
    assert stored.read().schema.equals(content.schema)
    if form.name != "npy":  # which has no room for them
        assert facts_of(stored.schema) == FACTS


def test_chosen_rows_and_columns_come_in_the_order_asked_for(form, tmp_path):
    content = table()
    stored = written(tmp_path / f"t{form.suffix}", form, content)
    rows = np.array([400, 3, 3, 499, 0, 250])
    found = stored.read(["id", "embedding"], rows)
    expected = content.select(["id", "embedding"]).take(pa.array(rows))
    assert found.to_pydict() == expected.to_pydict()
    assert stored.read(["number"], np.array([], np.int64)).num_rows == 0


def test_several_embeddings_of_patches_keep_their_shapes(form, tmp_path):
    content = table(20, embedding_0=(5, 3), embedding_2=(5, 3))
    stored = written(tmp_path / f"t{form.suffix}", form, content)
    assert embeddings_of(stored.schema) == {"embedding_0": (5, 3), "embedding_2": (5, 3)}
    assert stored.read().to_pydict() == content.to_pydict()


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"fits"}))
def test_float16_and_any_letters_survive(name, tmp_path):
    content = table(50, "float16", unicode=True)
    stored = written(tmp_path / f"t{FORMATS[name].suffix}", FORMATS[name], content)
    assert stored.read().equals(content)


def test_what_fits_cannot_hold_is_refused(tmp_path):
    form = FORMATS["fits"]
    assert form.fit(table(2, "float16").schema).equals(table(2).schema)
    with pytest.raises(UserError, match="column id: FITS holds ASCII alone, not 'Größe-0'"):
        written(tmp_path / "t.fits", form, table(3, unicode=True))


@pytest.mark.parametrize("name", ["fits", "hdf5", "npy"])
def test_a_missing_truth_value_is_refused_where_it_would_become_one(name, tmp_path):
    schema = table_schema({"merger": pa.bool_()}, {}, "float32", {})
    content = pa.table([["a", "b"], pa.array([True, None])], schema=schema)
    with pytest.raises(UserError, match="column merger: a truth value is missing"):
        written(tmp_path / "t", FORMATS[name], content)


def test_a_damaged_file_is_refused_by_name(form, tmp_path):
    path = tmp_path / f"t{form.suffix}"
    written(path, form, table())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(UserError, match=f"t{form.suffix}: cannot be read"):
        form.open(path).read()
    path.write_bytes(b"no table")
    with pytest.raises(UserError, match=f"t{form.suffix}: cannot be read"):
        form.open(path)


def test_a_files_suffix_tells_its_format(form):
    from pathlib import Path

    assert format_of(Path(f"x{form.suffix}")) is form
    with pytest.raises(UserError, match=r"x.csv: no table's file; .parquet, .fits"):
        format_of(Path("x.csv"))


def test_astropy_reads_the_fits_table_as_it_is(tmp_path):
    content = table(30, embedding=(4, 6))
    written(tmp_path / "t.fits", FORMATS["fits"], content)
    with fits.open(tmp_path / "t.fits") as hdus:
        hdus.verify("exception")
        header = hdus[1].header
        assert header["MODEL"] == FACTS["model"] and header["POOLING"] == "mean"
        assert json.loads(header["FACTS"]) == FACTS and header["TUNIT3"] == "deg"
    found = Table.read(tmp_path / "t.fits")
    expected = content.to_pydict()
    assert found.colnames == content.column_names and found["embedding"].shape == (30, 4, 6)
    flat = np.asarray(found["embedding"]).reshape(30, 24)
    np.testing.assert_array_equal(flat, np.array(expected["embedding"], np.float32))
    assert list(found["id"]) == expected["id"]
    for name in ("number", "ra", "merger"):
        values = [None if v is np.ma.masked else v for v in found[name]]
        assert values == expected[name], name
    assert len((tmp_path / "t.fits").read_bytes()) % 2880 == 0


def test_numpy_maps_the_npy_table(tmp_path):
    content = table(30)
    written(tmp_path / "t.npy", FORMATS["npy"], content)
    array = np.load(tmp_path / "t.npy", mmap_mode="r")
    assert array["embedding"].shape == (30, 24)
    assert array["id"][4].decode() == content["id"][4].as_py()


def test_a_folder_of_parquet_parts_is_a_dataset_beside_files_of_ours(tmp_path):
    for part in range(2):
        written(tmp_path / f"part-{part:06d}.parquet", FORMATS["parquet"], table(20))
    (tmp_path / "_manifest.json").write_text("{}")
    (tmp_path / "_parts").mkdir()
    assert ds.dataset(tmp_path).to_table().num_rows == 40


def test_single_rows_are_read_from_small_row_groups(tmp_path):
    content = table(2000, embedding=(256,))
    written(tmp_path / "t.parquet", FORMATS["parquet"], content, parts=1)
    groups = FORMATS["parquet"].open(tmp_path / "t.parquet")._file.metadata
    assert groups.row_group(0).num_rows == 62  # of 1 KB each
    compressions = {groups.row_group(0).column(i).compression for i in range(groups.num_columns)}
    assert compressions == {"ZSTD"}
