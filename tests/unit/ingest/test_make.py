import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import webdataset
from PIL import Image

from astropt_ds.data.split import Split
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError
from astropt_ds.ingest.cells import key_of
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from tests.conftest import REPOSITORY, blob, write_images
from tests.unit.ingest.shards import made, members


@pytest.fixture
def survey(tmp_path):
    """(Job, table) of 40 images in groups of four, with a gap and a flag among the labels."""
    group = [f"field{i // 4}" for i in range(40)]
    z = [None if i == 5 else i / 40 for i in range(40)]
    catalogue = write_images(tmp_path, 40, redshift=z, field=group)
    job = Job(
        images=tmp_path,
        catalogue=catalogue,
        output=tmp_path / "shards",
        samples_per_shard=7,
        val_fraction=0.2,
        test_fraction=0.2,
    )
    return job, pd.read_csv(catalogue)


def test_every_image_is_in_one_split_with_its_bytes_and_labels(survey):
    job, table = survey
    report = make_shards(job)
    found = members(job.output)
    assert {split: len(keys) for split, keys in found.items()} == {
        split: n for split, n in report.samples.items() if n
    }
    everything = {key: parts for keys in found.values() for key, parts in keys.items()}
    assert len(everything) == sum(report.samples.values()) == 40
    for row in table.to_dict("records"):
        parts = everything[row["id"]]
        assert parts["jpg"] == (job.images / row["file"]).read_bytes()
        labels = json.loads(parts["json"])
        assert labels["id"] == row["id"] and labels["number"] == row["number"]
        assert labels["redshift"] == (None if row["id"] == "g00005" else row["redshift"])


def test_the_split_of_an_id_does_not_depend_on_the_rest_of_the_survey(survey):
    job, _ = survey
    make_shards(job)
    make_shards(replace(job, output=job.images / "part", filter="number < 20"))
    whole, part = members(job.output), members(job.images / "part")
    for split, keys in part.items():
        assert set(keys) <= set(whole[split])


def test_a_group_stays_on_one_side(survey):
    job, table = survey
    make_shards(replace(job, group_column="field"))
    split_by_key = {k: split for split, keys in members(job.output).items() for k in keys}
    sides = table.assign(split=table["id"].map(split_by_key)).groupby("field")["split"].nunique()
    assert (sides == 1).all()
    assert len(set(split_by_key.values())) > 1


def test_the_manifest_and_index_describe_the_shards(survey):
    job, _ = survey
    make_shards(job)
    manifest = Folder(job.output).manifest
    for name, entry in manifest.splits.items():
        assert (
            entry.samples
            == sum(s.samples for s in entry.shards)
            == len(members(job.output).get(name, {}))
        )
        assert all(s.samples == 7 for s in entry.shards[:-1])
    split = Split(Folder(job.output), "train")
    stored = members(job.output)["train"]
    for row in range(len(split)):
        shard, key = split.place(row)
        entry = split.index[row]
        data = (job.output / shard).read_bytes()[entry["offset"] :][: entry["size"]]
        assert data == stored[key]["jpg"]
        assert (entry["width"], entry["height"]) == (64, 64)


def test_the_same_input_gives_the_same_bytes(survey):
    job, _ = survey
    make_shards(job)
    make_shards(replace(job, output=job.images / "again"))
    for path in sorted(job.output.iterdir()):
        assert path.read_bytes() == (job.images / "again" / path.name).read_bytes(), path.name


def test_webdataset_reads_the_shards(survey):
    job, _ = survey
    make_shards(job)
    urls = sorted(map(str, job.output.glob("train-*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert {s["json"]["id"] for s in samples} == set(members(job.output)["train"])
    assert all(s["jpg"].shape == (64, 64, 3) for s in samples)


def test_what_cannot_be_used_is_left_out_and_listed(survey):
    job, table = survey
    files = [job.images / f for f in table["file"]]
    table.loc[4, "file"] = None
    table.to_csv(job.catalogue, index=False)
    files[0].write_bytes(files[0].read_bytes()[:200])
    files[5].write_bytes(b"")
    files[6].write_bytes(b"ra,dec\n")
    files[1].unlink()
    Image.fromarray(blob(1)[..., 0]).save(files[2])
    Image.fromarray(blob(1, side=12)).save(files[3])
    report = make_shards(job)
    assert report.rejected == 7 and sum(report.samples.values()) == 33
    listed = pd.read_csv(job.output / "rejected.csv").set_index("id")["reason"]
    assert "cannot be decoded" in listed["g00000"]
    assert listed["g00004"] == "has no file name"
    assert listed["g00005"] == "is empty"
    assert listed["g00006"] == "cannot be decoded (no image format that Pillow knows)"
    assert listed["g00001"] == "No such file or directory"
    assert listed["g00002"] == "has 1 channel; 3 would be right"
    assert listed["g00003"] == "is 12 x 12 pixels, smaller than 16"


def test_parquet_tables_and_64_bit_ids_keep_their_digits(survey):
    job, table = survey
    identifiers = [587736915678593357 + i for i in range(40)]
    table.assign(id=identifiers).to_parquet(job.images / "table.parquet")
    table.assign(id=identifiers).to_csv(job.images / "table.csv", index=False)
    for name in ("table.parquet", "table.csv"):
        output = job.images / name.replace(".", "_")
        make_shards(replace(job, catalogue=job.images / name, output=output))
        keys = {key for split in members(output).values() for key in split}
        assert keys == set(map(str, identifiers))


def test_without_a_catalogue_every_image_below_the_folder_is_taken(survey):
    job, _ = survey
    nested = job.images / "images" / "deep"
    nested.mkdir()
    Image.fromarray(blob(3)).save(nested / "m31.v2.PNG")
    report = make_shards(replace(job, catalogue=None))
    assert sum(report.samples.values()) == 41
    parts = [
        p[key_of("images/deep/m31.v2")]
        for p in members(job.output).values()
        if key_of("images/deep/m31.v2") in p
    ]
    assert set(parts[0]) == {"png", "json"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": "nowhere"}, "--images nowhere: is no folder"),
        ({"catalogue": "none.csv"}, "cannot be read"),
        ({"id_column": "objid"}, "--id-column objid: .* it has id, file, number, redshift, field"),
        ({"group_column": "tile"}, "--group-column tile: .* no such column"),
        ({"filter": "mag < 3"}, "'mag' is not defined; a condition on id, file, number, redshift"),
        ({"filter": "number <"}, "--filter 'number <': invalid syntax"),
        ({"filter": "field"}, "--filter 'field': .* would be right"),
        ({"filter": "number > 99"}, "--filter 'number > 99': keeps none of 40 rows"),
        (
            {"catalogue": None, "filter": "number > 9"},
            "--filter is about a table: --cat",
        ),
        ({"id_column": "field"}, "holds 30 ids twice, 'field0' for one"),
        ({"samples_per_shard": 0}, "1 or more"),
        ({"val_fraction": 0.9}, "--val-fraction 0.9 .* 1 at most together"),
        ({"val_fraction": -0.1}, "--val-fraction -0.1 .* 0 or more each"),
        ({"val_fraction": float("nan")}, "--val-fraction nan .* 0 or more each"),
        ({"min_side": -3}, "--min-side -3: 1 or more"),
        ({"processes": 0}, "--processes 0: 1 or more"),
        ({"images": None}, "just one of --images, --parquet, --hdf5, --fits .* not 0"),
        ({"file_column": "path"}, "--file-column path: .* no such column; it has id, file"),
        ({"columns": ("number", "z")}, "--columns z: .* no such column; it has id, file"),
        ({"split_column": "field"}, "--val-fraction 0.2: --split-column field gives the splits"),
        ({"healpix_order": 4}, "--ra-column ra: .* no such column"),
        ({"image_column": "image"}, "--image-column goes with --parquet, not with --images"),
        ({"stretch": "asinh"}, "--stretch goes with --hdf5 and --fits, not with --images"),
        ({"nan": "zero"}, "--nan zero: .* holds 8-bit images; it is for fluxes"),
        ({"output": "images/00000.jpg/x"}, "--output .*: cannot be written"),
        (
            {"min_side": 100},
            "none of 40 is usable; the first, images/.*.jpg: is 64 x 64 pixels, smaller than 100",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(survey, change, message):
    job, _ = survey
    in_survey = ("catalogue", "output")
    paths = {k: job.images / v if v and k in in_survey else v for k, v in change.items()}
    if paths.get("images"):
        paths["images"] = Path(paths["images"])
    with pytest.raises(UserError, match=message) as error:
        make_shards(replace(job, **paths))
    assert "\n" not in str(error.value)
    assert not job.output.exists() and not list(job.images.glob("*.partial"))


def test_an_existing_output_is_not_touched(survey):
    job, _ = survey
    make_shards(job)
    before = {p.name: p.stat().st_mtime_ns for p in job.output.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        make_shards(job)
    assert before == {p.name: p.stat().st_mtime_ns for p in job.output.iterdir()}


def test_the_command_line_reports_and_fails_clearly_and_processes_change_nothing(survey):
    job, _ = survey
    (job.images / "images/00003.jpg").write_bytes(b"")
    output = job.images / "by_three"
    command = [
        *(sys.executable, REPOSITORY / "tools/make_shards.py", "--images", job.images),
        *("--catalogue", job.catalogue, "--output", output, "--samples-per-shard", "7"),
        *("--val-fraction", "0.2", "--test-fraction", "0.2", "--processes", "3"),
    ]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr
    counts = make_shards(job).samples
    assert first.stdout.splitlines() == [
        f"{output}: {', '.join(f'{n} {split}' for split, n in counts.items())} (split by id)",
        f"1 images left out; reasons in {output / 'rejected.csv'}",
    ]
    assert {p.name for p in output.iterdir()} == {p.name for p in job.output.iterdir()}
    for path in job.output.iterdir():
        assert path.read_bytes() == (output / path.name).read_bytes(), path.name
    second = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert second.returncode == 2
    assert second.stderr == f"error: --output {output}: exists already; name a new folder\n"


def test_folders_that_name_splits_keep_them(survey, tmp_path):
    job, _ = survey
    folder = tmp_path / "by_folder"
    for i, split in enumerate(("train", "validation", "test", "train")):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"{i}.jpg").write_bytes((job.images / f"images/{i:05d}.jpg").read_bytes())
    found = made(tmp_path / "kept", images=folder)
    assert {i: sample["split"] for i, sample in found.items()} == {
        **{"train/0": "train", "validation/1": "val", "test/2": "test", "train/3": "train"}
    }


def test_images_without_a_place_on_the_sky_are_listed(survey):
    job, table = survey
    ra = [None if i < 2 else 9.0 * i for i in range(40)]
    table.assign(ra=ra, dec=0.0).to_csv(job.catalogue, index=False)
    report = make_shards(replace(job, healpix_order=2))
    assert report.splits == "by HEALPix tile of order 2"
    assert sum(report.samples.values()) == 38 and report.rejected == 2
    listed = pd.read_csv(job.output / "rejected.csv").set_index("id")
    assert list(listed.index) == ["g00000", "g00001"]
    assert listed["reason"]["g00001"] == "has no ra and dec, so no split"
    assert listed["file"]["g00001"] == "images/00001.jpg"


@pytest.mark.parametrize(
    "module, change, message",
    [
        ("h5py", {"images": None, "hdf5": (Path("x"),)}, "--hdf5 needs h5py"),
        ("astropy.io.fits", {"images": None, "fits": Path("x")}, "--fits needs astropy"),
        ("astropy.table", {"catalogue": Path("t.fits")}, "--catalogue t.fits needs astropy"),
        ("astropy_healpix", {"healpix_order": 2}, "--healpix-order needs astropy_healpix"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(
    survey, monkeypatch, module, change, message
):
    job, table = survey
    table.assign(ra=1.0, dec=0.0).to_csv(job.catalogue, index=False)
    if "images" in change:
        change = {**change, "catalogue": None}
    monkeypatch.setitem(sys.modules, module, None)  # as Python marks what cannot be imported
    with pytest.raises(UserError, match=message) as error:
        make_shards(replace(job, **change))
    assert str(error.value).endswith("pip install 'astropt-ds[surveys]' would be right")


def test_a_file_whose_name_is_no_text_is_named(survey):
    job, _ = survey
    (job.images / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    with pytest.raises(UserError, match=r"the name 'caf.*jpg' is not UTF-8; rename the file"):
        make_shards(replace(job, catalogue=None))


def test_only_the_columns_named_become_labels(survey):
    job, _ = survey
    make_shards(replace(job, columns=("number",), filter="field == 'field2'"))
    labels = [json.loads(p["json"]) for keys in members(job.output).values() for p in keys.values()]
    assert sorted(row["number"] for row in labels) == [8, 9, 10, 11]
    assert all(row.keys() == {"id", "number"} for row in labels)


def test_files_of_other_formats_are_listed_not_lost(survey):
    job, table = survey
    Image.fromarray(blob(0)).save(job.images / "a.tif")
    np.save(job.images / "b.npy", np.zeros((20, 20, 3), np.float32))
    (job.images / "c.dat").write_bytes((job.images / "images/00002.jpg").read_bytes())
    table.loc[:2, "file"] = ["a.tif", "b.npy", "c.dat"]
    table.to_csv(job.catalogue, index=False)
    report = make_shards(job)
    assert report.rejected == 2 and sum(report.samples.values()) == 38
    listed = pd.read_csv(job.output / "rejected.csv").set_index("id")["reason"]
    assert listed["g00000"] == "is neither JPEG nor PNG"
    assert listed["g00001"] == "holds fluxes; JPEG or PNG would be right"
    stored = {key: parts for keys in members(job.output).values() for key, parts in keys.items()}
    assert set(stored["g00002"]) == {"jpg", "json"}


def test_cells_of_any_type_become_json(tmp_path):
    catalogue = write_images(tmp_path, 2)
    table = pd.read_csv(catalogue).assign(
        flag=[True, False], when=pd.Timestamp("2026-01-01"), name=[b"a", b"b"]
    )
    table["vector"] = [np.arange(2.0), np.array([np.nan, 1.0])]
    table.to_parquet(tmp_path / "t.parquet")
    job = Job(images=tmp_path, catalogue=tmp_path / "t.parquet", output=tmp_path / "s")
    make_shards(job)
    everything = [p for split in members(job.output).values() for p in split.values()]
    labels = sorted((json.loads(p["json"]) for p in everything), key=lambda row: row["id"])
    assert labels[0]["flag"] is True and labels[0]["name"] == "a"
    assert labels[0]["when"].startswith("2026-01-01")
    assert labels[1]["vector"] == [None, 1.0]
    assert io.BytesIO(everything[0]["jpg"]).read(2) == b"\xff\xd8"


def test_an_image_that_no_index_can_hold_is_left_out_and_listed(tmp_path):
    Image.fromarray(np.zeros((16, 70_000, 3), np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(blob(0)).save(tmp_path / "good.png")
    make_shards(Job(images=tmp_path, output=tmp_path / "s"))
    listed = pd.read_csv(tmp_path / "s" / "rejected.csv")
    assert listed["reason"].tolist() == ["is 70000 x 16 pixels, larger than 65535"]


def test_pictures_of_other_kinds_are_told(tmp_path):
    for name in ("a.gif", "b.tif", "c.png"):
        Image.fromarray(blob(0)).save(tmp_path / name)
    said = []
    make_shards(Job(images=tmp_path, output=tmp_path / "s"), said.append)
    assert said == ["not used: a.gif, b.tif"]
