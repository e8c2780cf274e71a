"""Tables of many parts: found by id, read in any kind, exported whole or not at all."""

import resource
import subprocess
import sys

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table

from astropt_ds import read_embeddings
from astropt_ds.errors import UserError
from astropt_ds.table import index
from astropt_ds.table.export import export
from astropt_ds.table.formats import FORMATS, text_widths
from astropt_ds.table.index import find, hash_ids, load_index, write_index
from astropt_ds.table.manifest import PartEntry, TableManifest
from astropt_ds.table.schema import recast, table_schema
from tests.conftest import REPOSITORY

FACTS = {"model": "ab" * 32, "tokens": 64}


def piece(first, last, width=8):
    """Rows first to last; embedding n is filled with n."""
    schema = table_schema(
        {"ra": pa.float64(), "n": pa.int64()}, {"embedding": (width,)}, "float32", FACTS
    )
    n = np.arange(first, last)
    flat = pa.array(np.repeat(n, width).astype(np.float32))
    lists = pa.FixedSizeListArray.from_arrays(flat, width)
    ra = [None if i % 5 == 0 else i / 2 for i in n.tolist()]
    return pa.table([[f"g{i}" for i in n], ra, n, lists], schema=schema)


def make(folder, pieces, name="parquet"):
    """A complete table of some pieces."""
    folder.mkdir()
    form, entries = FORMATS[name], []
    for number, content in enumerate(pieces):
        path = folder / f"part-{number:06d}{form.suffix}"
        with form.create(path, content.schema, len(content), text_widths(content)) as writer:
            writer.write(content)
        entries.append(
            PartEntry(name=path.name, rows=len(content), bytes=path.stat().st_size, sha256="?")
        )
    found = write_index(folder, [form.open(folder / entry.name) for entry in entries])
    rows = sum(map(len, pieces))
    TableManifest(file_format=name, rows=rows, asked=rows, facts=FACTS, parts=entries).save(folder)
    return found


@pytest.fixture(scope="module", params=sorted(FORMATS))
def table(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "table"
    make(folder, [piece(0, 700), piece(700, 1000), piece(1000, 1001)], request.param)
    return folder


def test_rows_of_ids_come_in_the_order_asked_for_wherever_they_are(table):
    wanted = [1000, 3, 699, 700, 3, 950]
    found = read_embeddings(table, ids=[f"g{n}" for n in wanted], columns=["n", "embedding"])
    assert list(found) == ["id", "n", "embedding"] and found["n"].tolist() == wanted
    assert [row[0] for row in found["embedding"]] == wanted


def test_ids_are_normalised_as_surveys_are(tmp_path):
    schema = table_schema({}, {"embedding": (2,)}, "float32", {})
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(4, dtype=np.float32)), 2)
    make(tmp_path / "table", [pa.table([["17", "NGC 1"], lists], schema=schema)])
    for ids in ([17, b"NGC 1  "], [np.int64(17), "b'NGC 1'"], ["17", "NGC 1"]):
        assert list(read_embeddings(tmp_path / "table", ids=ids)["id"]) == ["17", "NGC 1"]


def test_every_kind_holds_the_same(table):
    frame = read_embeddings(table)
    assert len(frame) == 1001 and frame["embedding"][5].tolist() == [5.0] * 8
    assert frame["ra"].isna().sum() == 201
    rows = read_embeddings(table, kind="numpy")
    assert rows["embedding"].shape == (1001, 8) and rows["id"][7] == "g7"
    sky = read_embeddings(table, kind="astropy")
    assert isinstance(sky, Table) and sky["embedding"].shape == (1001, 8)
    arrow = read_embeddings(table, kind="arrow")
    assert arrow["n"].to_pylist() == list(range(1001))
    assert frame.attrs == FACTS and sky.meta == FACTS


def test_what_is_not_there_is_told_by_name(table, tmp_path):
    with pytest.raises(UserError, match=r"holds no galaxy 'gone' \(1 of 2 ids are not in it\)"):
        read_embeddings(table, ids=["g1", "gone"])
    with pytest.raises(UserError, match="has no column 'mass'; it has id, ra, n, embedding"):
        read_embeddings(table, columns=["mass"])
    with pytest.raises(UserError, match="kind='polars': one of pandas, astropy, numpy, arrow"):
        read_embeddings(table, kind="polars")
    with pytest.raises(UserError, match="does not exist"):
        read_embeddings(tmp_path / "nowhere")
    with pytest.raises(UserError, match="_manifest.json: cannot be read .*same command finishes"):
        read_embeddings(tmp_path)


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"format": "1"}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "_manifest.json").write_text(text)
    with pytest.raises(UserError, match="_manifest.json: not a table's"):
        read_embeddings(tmp_path)


@pytest.mark.parametrize("bucket", [2_000_000, 100])
def test_duplicated_ids_are_counted_and_all_their_rows_found(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(index, "BUCKET_ROWS", bucket)
    found = make(tmp_path / "table", [piece(0, 300), piece(290, 400), piece(295, 297)])
    assert found.count == 12 and set(found.ids) == {f"g{n}" for n in range(290, 300)}
    rows = np.load(tmp_path / "table" / "_index.npy")
    assert len(rows) == 412 and (np.diff(rows["hash"].astype(object)) >= 0).all()
    assert read_embeddings(tmp_path / "table", ids=["g295", "g1"])["n"].tolist() == [
        295,
        295,
        295,
        1,
    ]
    assert not list((tmp_path / "table").glob("_index-*"))


def test_ids_of_the_same_hash_are_told_apart(tmp_path, monkeypatch):
    narrow = lambda ids: hash_ids(ids) & np.uint64(7)  # noqa: E731
    monkeypatch.setattr(index, "hash_ids", narrow)
    found = make(tmp_path / "table", [piece(0, 100), piece(100, 200)])
    assert found.count == 0
    assert read_embeddings(tmp_path / "table", ids=["g150", "g3"])["n"].tolist() == [150, 3]
    with pytest.raises(UserError, match="holds no galaxy 'g200'"):
        read_embeddings(tmp_path / "table", ids=["g200"])
    assert len(find(load_index(tmp_path / "table"), ["g3"])[0]) > 1


def test_the_index_needs_no_more_memory_for_more_rows(tmp_path, monkeypatch):
    """In buckets: the arrays that are sorted stay small."""
    monkeypatch.setattr(index, "BUCKET_ROWS", 1000)
    largest = []
    read = np.fromfile

    def watched(*args):
        rows = read(*args)
        largest.append(len(rows))
        return rows

    monkeypatch.setattr(np, "fromfile", watched)
    make(tmp_path / "table", [piece(0, 10_000), piece(10_000, 20_000)])
    assert sum(largest) == 20_000 and max(largest) < 2000


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_table_goes_to_any_format_and_back_in_parts_and_as_one_file(table, name, tmp_path):
    expected = read_embeddings(table, kind="arrow").to_pydict()
    suffix = FORMATS[name].suffix
    assert export(table, tmp_path / f"one{suffix}") == 1001
    export(table, tmp_path / "parts", name)
    export(tmp_path / f"one{suffix}", tmp_path / "back", "parquet")
    for path in (tmp_path / f"one{suffix}", tmp_path / "parts", tmp_path / "back"):
        assert read_embeddings(path, kind="arrow").to_pydict() == expected
        assert read_embeddings(path, ids=["g800", "g5"])["n"].tolist() == [800, 5]
    assert len(list((tmp_path / "parts").glob(f"part-*{suffix}"))) == 3


def test_a_table_may_have_more_parts_than_a_process_may_open_files(tmp_path):
    pieces = [piece(n, n + 1) for n in range(300)]
    make(tmp_path / "table", pieces)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        assert read_embeddings(tmp_path / "table")["n"].tolist() == list(range(300))
        found = read_embeddings(tmp_path / "table", ids=[f"g{n}" for n in range(300)])
        assert found["n"].tolist() == list(range(300))
        assert export(tmp_path / "table", tmp_path / "parts", "arrow") == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_single_file_is_exported_in_pieces_and_facts_go_along(table, tmp_path, monkeypatch):
    monkeypatch.setattr("astropt_ds.table.export.PIECE_ROWS", 300)
    export(table, tmp_path / "one.arrow")
    with pa.memory_map(str(tmp_path / "one.arrow")) as file:
        batches = pa.ipc.open_file(file)
        sizes = [batches.get_batch(i).num_rows for i in range(batches.num_record_batches)]
    assert sizes == [300, 300, 100, 300, 1]  # the last file has a row
    export(tmp_path / "one.arrow", tmp_path / "again", "parquet")
    assert read_embeddings(tmp_path / "again").attrs == FACTS
    assert read_embeddings(tmp_path / "again")["n"].tolist() == list(range(1001))


def test_float16_goes_to_fits_as_float32_and_failures_go_along(tmp_path):
    half = recast(
        piece(0, 9),
        table_schema({"ra": pa.float64(), "n": pa.int64()}, {"embedding": (8,)}, "float16", FACTS),
    )
    make(tmp_path / "table", [half])
    (tmp_path / "table" / "_failures.csv").write_text("id,file,reason\n")
    export(tmp_path / "table", tmp_path / "t.fits")
    assert Table.read(tmp_path / "t.fits")["embedding"].dtype == ">f4"
    export(tmp_path / "table", tmp_path / "parts", "fits")
    assert (tmp_path / "parts" / "_failures.csv").read_text() == "id,file,reason\n"
    found = read_embeddings(tmp_path / "parts", ids="g3", columns="embedding", kind="numpy")
    assert found["embedding"].tolist() == [[3.0] * 8]


def test_files_of_others_are_refused_in_a_line(tmp_path):
    pq.write_table(pa.table({"n": [1]}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="none.parquet: no table of embeddings"):
        export(tmp_path / "none.parquet", tmp_path / "x.npy")
    pq.write_table(pa.table({"n": pa.array([1], pa.int32()), "id": ["a"]}), tmp_path / "i.parquet")
    with pytest.raises(UserError, match="i.parquet: column 'n' holds int32; embeddings, string"):
        export(tmp_path / "i.parquet", tmp_path / "x.npy")
    pq.write_table(pa.table({"n": [1], "id": ["a"]}), tmp_path / "j.parquet")
    export(tmp_path / "j.parquet", tmp_path / "x.npy")
    assert read_embeddings(tmp_path / "x.npy").to_dict("list") == {"id": ["a"], "n": [1]}


def test_all_rows_of_an_id_are_found_in_a_folder_and_in_a_file(tmp_path):
    make(tmp_path / "table", [piece(0, 9), piece(3, 5)])
    export(tmp_path / "table", tmp_path / "one.parquet")
    for path in (tmp_path / "table", tmp_path / "one.parquet"):
        assert read_embeddings(path, ids=["g4", "g1"])["n"].tolist() == [4, 4, 1]


def test_columns_may_be_left_out_of_an_export(table, tmp_path):
    export(table, tmp_path / "small.parquet", columns=["embedding"])
    assert list(read_embeddings(tmp_path / "small.parquet")) == ["id", "embedding"]


def test_an_export_that_fails_leaves_nothing(table, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="a name with .parquet, .*, or --format"):
        export(table, tmp_path / "folder")
    with pytest.raises(UserError, match="is fits by its name, not npy"):
        export(table, tmp_path / "x.fits", "npy")
    (tmp_path / "there.npy").touch()
    with pytest.raises(UserError, match="cannot be written .*exists already"):
        export(table, tmp_path / "there.npy")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("astropt_ds.table.export.write_index", full)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        export(table, tmp_path / "folder", "parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["there.npy"]


def test_the_command_line_says_how_much_it_wrote(tmp_path):
    make(tmp_path / "table", [piece(0, 20)])
    arguments = ["--input", tmp_path / "table", "--output", tmp_path / "t.fits"]
    command = [sys.executable, "tools/export_embeddings.py", *map(str, arguments)]
    run = [
        subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, env={"PYTHONPATH": "."}
        )
        for _ in range(2)
    ]
    assert run[0].stdout == f"{tmp_path / 't.fits'}: 20 galaxies\n" and run[0].returncode == 0
    assert run[1].returncode == 2 and run[1].stderr.count("\n") == 1
    assert len(Table.read(tmp_path / "t.fits")) == 20


@pytest.mark.parametrize("rows", [200_000, pytest.param(5_000_000, marks=pytest.mark.slow)])
def test_memory_stays_flat_however_many_rows_there_are(tmp_path, rows):
    from astropt_ds.benchmark.table import PART_ROWS, parts_of, write_table

    process = psutil.Process()
    peaks = []
    folder = tmp_path / "table"
    for content in write_table(folder, parts_of(rows, 128, "float16")):
        peaks.append(process.memory_info().rss)
        assert content <= PART_ROWS
    quarter = len(peaks) // 4
    assert max(peaks) - max(peaks[: quarter + 1]) < 150_000_000
    wanted = [f"g{n}" for n in np.random.default_rng(0).integers(0, rows, 1000)]
    found = read_embeddings(folder, ids=wanted)
    assert list(found["id"]) == wanted
