"""Parquet files with images, among them the paper's data set as a snapshot of its hub lies."""

import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

from astropt_ds.errors import UserError
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from tests.conftest import blob
from tests.unit.ingest.shards import made, samples

BIG = 587736915678593357


def jpeg(i, side=32):
    return simplejpeg.encode_jpeg(blob(i, side), quality=90)


def write_images(path, ids, images, group=5, **columns):
    """A file of the hub's layout."""
    cells = [None if i is None else {"bytes": i, "path": f"{n}.jpg"} for n, i in enumerate(images)]
    table = pa.table({"image": cells, "dr8_id": ids, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


@pytest.fixture
def snapshot(tmp_path):
    """(folder of the images, folder of the metadata, {id: bytes}): 24 galaxies, one damaged."""
    images = {f"{400000 + i}_{i}": jpeg(i) for i in range(24)}
    images["400007_7"] = images["400007_7"][:100]
    blobs = tmp_path / "blobs"
    data = tmp_path / "snapshots" / "4b0e" / "data"
    data.mkdir(parents=True)
    names = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]
    parts = {**dict(zip(names, (8, 8, 4), strict=True)), "test-00000-of-00001": 4}
    ids = iter(images)
    for number, (name, count) in enumerate(parts.items()):
        here = [next(ids) for _ in range(count)]
        write_images(blobs / f"{number:040x}", here, [images[i] for i in here], group=3)
        (data / f"{name}.parquet").symlink_to(f"../../../blobs/{number:040x}")
    (data.parent / "README.md").write_text("a card\n")
    metadata = tmp_path / "galaxies_metadata"
    rows = pd.DataFrame({"dr8_id": list(images), "mag_r_desi": np.arange(24.0), "n": range(24)})
    rows = pd.concat([rows[rows["n"] != 3], pd.DataFrame({"dr8_id": ["9_9"], "n": [99]})])
    (metadata / "data").mkdir(parents=True)
    rows[::2].to_parquet(metadata / "data" / "a.parquet")
    rows[1::2].to_parquet(metadata / "data" / "b.parquet")
    return data.parent, metadata, images


def test_a_hub_snapshot_keeps_its_splits_bytes_and_labels(snapshot, tmp_path):
    folder, metadata, images = snapshot
    job = Job(parquet=(folder,), catalogue=metadata, output=tmp_path / "s", samples_per_shard=5)
    said = []
    report = make_shards(job, said.append)
    assert report.samples == {"train": 15, "val": 4, "test": 4}
    assert report.rejected == 1 and report.splits == "as the names of the files say"
    assert said == [
        f"1 images have no row in {metadata}",
        f"1 rows of {metadata} have no image",
    ]
    listed = pd.read_csv(job.output / "rejected.csv").iloc[0]
    assert listed["id"] == "400007_7" and "cannot be decoded" in listed["reason"]
    assert listed["file"] == "data/train-00000-of-00002.parquet, row 7"
    found = samples(job.output)
    assert found.keys() == images.keys() - {"400007_7"}
    for number, (identifier, sample) in enumerate((i, found[i]) for i in images if i != "400007_7"):
        assert sample["image"] == images[identifier] and sample["suffix"] == "jpg"
        n = int(identifier.split("_")[1])
        expected = {"id": identifier, "dr8_id": identifier}
        if n != 3:
            expected |= {"mag_r_desi": float(n), "n": n}
        assert sample["labels"] == expected, number
    # read in the order of the files
    assert list(found)[:3] == ["400020_20", "400021_21", "400022_22"]


def test_a_filter_reads_the_files_own_columns_and_the_catalogues(snapshot, tmp_path):
    folder, metadata, _ = snapshot
    options = {"parquet": (folder,), "catalogue": metadata}
    found = made(tmp_path / "a", filter="mag_r_desi > 4 and dr8_id != '400009_9'", **options)
    assert len(found) == 24 - 5 - 1 - 1
    few = made(tmp_path / "b", filter="n < 2", columns=("n",), **options)
    assert [s["labels"] for s in few.values()] == [
        {"id": f"40000{i}_{i}", "n": i} for i in range(2)
    ]


def test_a_catalogue_is_joined_on_the_column_that_the_files_have(tmp_path):
    write_images(tmp_path / "t.parquet", ["a", "b"], [jpeg(0), jpeg(1)])
    table = pd.DataFrame({"id": [7, 8], "dr8_id": ["b", "a"], "z": [0.1, 0.2]})
    table.to_csv(tmp_path / "t.csv", index=False)
    found = made(tmp_path / "s", parquet=(tmp_path / "t.parquet",), catalogue=tmp_path / "t.csv")
    assert found["a"]["labels"] == {"id": "a", "catalogue_id": 8, "dr8_id": "a", "z": 0.2}


def test_binary_columns_png_and_second_images(tmp_path):
    file = io.BytesIO()
    Image.fromarray(blob(1, 32)).save(file, "PNG")
    second = [{"bytes": jpeg(9), "path": None}] * 4
    table = pa.table(
        {
            "picture": [jpeg(0), file.getvalue(), None, b"GIF89a"],
            "objid": pa.array([BIG, BIG + 1, BIG + 2, BIG + 3]),
            "host": pa.array([BIG + 7, None, None, None]),
            "crop": second,
            "vector": [[1.0, float("nan")]] * 4,
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    job = Job(parquet=(tmp_path / "t.parquet",), image_column="picture", output=tmp_path / "s")
    said = []
    assert make_shards(job, said.append).rejected == 2
    assert said == ["not used: crop"]
    found = samples(job.output)
    assert found[str(BIG)]["suffix"] == "jpg" and found[str(BIG + 1)]["suffix"] == "png"
    assert found[str(BIG)]["labels"] == {
        **{"id": str(BIG), "objid": BIG, "host": BIG + 7, "vector": [1.0, None]}
    }
    reasons = pd.read_csv(tmp_path / "s" / "rejected.csv")["reason"]
    assert reasons[0] == "has no image" and "cannot be decoded" in reasons[1]


def test_a_file_that_cannot_be_read_costs_no_other(snapshot, tmp_path):
    folder, _, images = snapshot
    for name in ("train-00000-of-00002", "train-00009-of-00002"):  # the first of all, and one more
        (folder / "data" / f"{name}.parquet").unlink(missing_ok=True)
        (folder / "data" / f"{name}.parquet").write_bytes(b"PAR1 cut off")
    found = made(tmp_path / "s", parquet=(folder,))
    assert set(found) == set(list(images)[8:])
    listed = pd.read_csv(tmp_path / "s" / "rejected.csv")
    assert listed["file"].str.contains("train-00000|train-00009").sum() == 2
    assert listed["reason"].str.contains("cannot be read").sum() == 2


def test_a_folder_that_is_named_as_a_split_gives_it(tmp_path):
    write_images(tmp_path / "validation" / "0.parquet", ["a", "b"], [jpeg(0), jpeg(1)])
    found = made(tmp_path / "s", parquet=(tmp_path / "validation",))
    assert {sample["split"] for sample in found.values()} == {"val"}


def test_a_damaged_row_group_costs_no_other(tmp_path):
    path = tmp_path / "t.parquet"
    ids = [f"g{i}" for i in range(12)]
    write_images(path, ids, [jpeg(i) for i in range(12)], group=4)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    at = column.dictionary_page_offset or column.data_page_offset
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    assert len(made(tmp_path / "s", parquet=(path,))) == 8
    reasons = pd.read_csv(tmp_path / "s" / "rejected.csv").set_index("id")["reason"]
    assert list(reasons.index) == ["g4", "g5", "g6", "g7"]
    assert reasons.str.startswith("cannot be read (").all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_column": "img"}, "--image-column img: .*t.parquet has no such column; it has"),
        ({"image_column": "mag"}, "--image-column mag: .* holds double there; the bytes of"),
        ({"id_column": "objid"}, "--id-column objid: .* has no such column; it has dr8_id, mag"),
        ({"id_column": "mag"}, "--parquet .* column 'mag' holds 2 ids twice, '1' for one"),
        ({"id_column": "empty"}, "column 'empty' is empty in 3 of 3 rows, row 0 for one"),
        ({"parquet": ("none",)}, "--parquet .*none: is not there"),
        ({"parquet": ("void",)}, r"--parquet .*void: holds no file \*.parquet"),
        ({"parquet": ("bad.parquet",)}, "bad.parquet: cannot be read"),
        ({"parquet": ("t.parquet", "other.parquet")}, "--id-column dr8_id: .*other.* no such"),
        ({"group_column": "tile"}, "--group-column tile: --parquet .* has no such column"),
        ({"columns": ("z",)}, "--columns z: --parquet .* has no such column; it has dr8_id, mag"),
        ({"filter": "z > 1"}, "--filter 'z > 1': .* a condition on dr8_id, mag, empty"),
        ({"healpix_order": 3}, "--ra-column ra: .* has no such column"),
        ({"stretch": "asinh", "rgb": ("a", "b", "c")}, "--stretch goes with --hdf5 and --fits"),
        ({"nan": "zero"}, "--nan zero: .* holds 8-bit images; it is for fluxes"),
        ({"bands": ("g",)}, "--bands goes with --hdf5 and --fits, not with --parquet"),
        ({"file_column": "f"}, "--file-column goes with --images and --fits"),
        (
            {"catalogue_id_column": "f"},
            "--catalogue-id-column is about a table",
        ),
        ({"images": "void"}, "just one of --images, --parquet, --hdf5, --fits"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, change, message):
    write_images(tmp_path / "t.parquet", ["a", "b", "c"], [jpeg(0)] * 3, mag=[1.0] * 3)
    table = pq.read_table(tmp_path / "t.parquet").append_column("empty", pa.nulls(3, pa.int64()))
    pq.write_table(table, tmp_path / "t.parquet")
    pq.write_table(table.drop_columns(["dr8_id"]), tmp_path / "other.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "void").mkdir()
    options = {"parquet": ("t.parquet",), **change}
    options["parquet"] = tuple(tmp_path / path for path in options["parquet"])
    if "images" in options:
        options["images"] = tmp_path / options["images"]
    with pytest.raises(UserError, match=message) as error:
        make_shards(Job(output=tmp_path / "s", **options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("s*"))
