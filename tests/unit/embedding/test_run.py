"""From images to a table: right numbers by id, every galaxy accounted for, nothing done twice."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest

from astropt_ds import read_embeddings
from astropt_ds.embedding.estimate import estimate
from astropt_ds.embedding.run import embed
from astropt_ds.errors import UserError
from tests.conftest import write_images
from tests.unit.embedding.conftest import tiny_model
from tests.unit.embedding.tables import check, failures_of, quiet, table_of

pytestmark = pytest.mark.usefixtures("many_parts")


@pytest.mark.parametrize("batch", ["auto", 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_galaxy_of_every_split_has_its_own_embedding_once(job, expected, workers, batch):
    check(table_of(job(workers=workers, batch=batch)), expected)


def test_parts_are_the_same_bytes_whoever_makes_them_and_a_second_call_does_nothing(job, tmp_path):
    one, other = job(), job(output=tmp_path / "other", workers=2)
    embed(one, quiet)
    embed(other, quiet)
    parts = sorted(path.name for path in one.output.glob("part-*"))
    assert len(parts) == 10
    before = {path: path.stat().st_mtime_ns for path in one.output.rglob("*") if path.is_file()}
    for name in parts:
        assert (one.output / name).read_bytes() == (other.output / name).read_bytes()
    said = []
    embed(one, said.append)
    assert said == []
    after = {path: path.stat().st_mtime_ns for path in one.output.rglob("*") if path.is_file()}
    assert after == before


def test_a_parquet_folder_opens_as_one_dataset(job, expected):
    embed(job(), quiet)
    assert ds.dataset(job().output, format="parquet").to_table().num_rows == len(expected)


def test_other_arguments_on_the_same_folder_are_refused_by_name(job):
    embed(job(limit=20), quiet)
    for options, words in (
        ({"limit": 21}, "--limit 20, not 21|galaxies 20, not 21"),
        ({"limit": 20, "layers": (0,)}, r"--layer \[1\], not \[0\]"),
        ({"limit": 20, "pooling": "max"}, "--pool mean, not max"),
        ({"limit": 20, "dtype": "float16"}, "--dtype float32, not float16"),
        ({"limit": 20, "splits": ("val",)}, "--data"),
    ):
        with pytest.raises(UserError, match=words):
            embed(job(**options), quiet)


def test_ids_choose_galaxies_and_absent_ones_are_told(job, expected, tmp_path):
    wanted = [*list(expected)[3:80:11], "nobody"]
    (tmp_path / "ids.txt").write_text("\n".join(wanted) + "\n\n")
    table = table_of(job(ids=tmp_path / "ids.txt"))
    assert set(table["id"]) == set(wanted) - {"nobody"}
    assert failures_of(job()) == {"nobody": "is not in the data"}
    manifest = json.loads((job().output / "_manifest.json").read_text())
    assert manifest["asked"] == manifest["rows"] + 1 == len(wanted)


def test_splits_and_limit_choose_galaxies(job, expected):
    table = table_of(job(splits=("val",), limit=5))
    assert len(table) == 5 and set(table["split"]) == {"val"}


def test_columns_come_from_labels_and_catalogue_by_id(job, tmp_path, expected):
    rows = [f"{i},{n},{n / 7},{'' if n % 2 else n}" for n, i in enumerate(expected)]
    (tmp_path / "sky.csv").write_text("id,RA,Dec,mag\n" + "\n".join(rows[:100]) + "\n")
    survey = {"catalogue": tmp_path / "sky.csv"}
    embed(job(survey=survey, columns=("mag", "number")), quiet)
    table = read_embeddings(job().output).set_index("id")
    assert list(table) == ["split", "number", "ra", "dec", "mag", "embedding"]
    for n, identifier in enumerate(expected):
        row = table.loc[identifier]
        assert row.number == int(identifier[1:])
        if n < 100:
            assert row.ra == n and row.dec == pytest.approx(n / 7)
            assert pd.isna(row.mag) if n % 2 else row.mag == n
        else:
            assert np.isnan(row.ra) and pd.isna(row.mag)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_are_embedded_through_a_small_cache(job, serve, tmp_path, expected, workers):
    url, *_ = serve()
    remote = {"data": (url,), "cache": str(tmp_path / "cache"), "cache_gb": 0.001}
    table = table_of(job(**remote, workers=workers))
    assert sorted(table["id"]) == sorted(expected)
    with pytest.raises(UserError, match="--cache-gb 1e-05: .* would be right"):
        embed(job(**{**remote, "cache_gb": 1e-5}), quiet)


def test_images_of_other_sizes_are_counted_by_reason(job, tmp_path):
    write_images(tmp_path / "stamps", 20, 64)
    small = tmp_path / "stamps" / "images" / "00003.jpg"
    big = tmp_path / "stamps" / "images" / "00004.jpg"
    write_images(tmp_path / "small", 1, 48)
    write_images(tmp_path / "big", 1, 96)
    shutil.copy(tmp_path / "small/images/00000.jpg", small)
    shutil.copy(tmp_path / "big/images/00000.jpg", big)  # its centre is taken
    (tmp_path / "stamps" / "images" / "00005.jpg").write_bytes(b"\xff\xd8 is no image")
    table = table_of(job(data=(str(tmp_path / "stamps"),)))
    failed = failures_of(job())
    assert set(failed) == {"images/00003", "images/00005"} and len(table) == 18
    assert failed["images/00003"] == "is 48 x 48 pixels, smaller than 64 x 64"
    assert "cannot be decoded" in failed["images/00005"]
    manifest = json.loads((job().output / "_manifest.json").read_text())
    assert manifest["failures"]["is 48 x 48 pixels, smaller than 64 x 64"] == 1


def test_an_id_that_is_there_twice_is_counted_named_and_an_error(job, copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["splits"]["test"] = manifest["splits"]["val"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    count = manifest["splits"]["val"]["samples"]
    for _ in range(2):  # also when all is done already
        with pytest.raises(UserError, match=f"{count} ids are there more than once, 'g0"):
            embed(job(data=(str(copied),), splits=("val", "test")), quiet)
    assert json.loads((job().output / "_manifest.json").read_text())["duplicates"] == count


def test_embeddings_that_are_no_numbers_or_too_large_are_failures(job, model, tmp_path):
    from astropt_ds import save_model

    loud = tiny_model()
    loud.transformer.h[1].mlp.c_proj.weight.data.mul_(1e7)
    save_model(loud, tmp_path / "loud")
    with pytest.raises(UserError, match="none of 150 galaxies is embedded; one its embedding is"):
        embed(job(model=str(tmp_path / "loud"), dtype="float16"), quiet)
    assert set(failures_of(job()).values()) == {"its embedding is too large for float16"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": ("nowhere",)}, "--data nowhere: is not there"),
        ({"model": "nowhere"}, "nowhere: does not exist"),
        ({"dtype": "int8"}, "--dtype int8: float32 or float16"),
        ({"limit": 0}, "--limit 0: 1 or more"),
        ({"workers": -1}, "--workers -1: auto, or 0 or more"),
        ({"image_size": 65}, "--image-size 65: .* a multiple of 16 up to 64"),
        ({"image_size": 0}, "--image-size 0: "),
        ({"cache": "c", "cache_gb": 0.0}, "--cache-gb 0: above 0"),
        ({"file_format": "fits", "dtype": "float16"}, "--format fits: has no float16; --dtype"),
        ({"image_size": 80}, "--image-size 80 is more than the images' 64"),
        ({"tokens": 17}, "--tokens 17: 1 to 16"),
        ({"splits": ("tset",)}, "no samples in split 'tset'"),
        ({"columns": ("mass",)}, "--columns mass: .* has no such column; it has file, id, number"),
        ({"data": ("https://nowhere/shards",)}, "is remote and needs --cache"),
        ({"survey": {"bands": ("g",)}}, "--bands: .* holds shards"),
    ],
)
def test_bad_input_ends_in_a_line_and_leaves_nothing(job, options, words):
    with pytest.raises(UserError, match=words):
        embed(job(**options), quiet)
    assert not list(job().output.glob("part-*"))


def test_a_model_of_other_channels_is_refused(job, tmp_path):
    from astropt_ds import save_model

    save_model(tiny_model(channels=4), tmp_path / "four")
    with pytest.raises(UserError, match=r"images of 3 channels \(R G B\); .*four reads 4"):
        embed(job(model=str(tmp_path / "four")), quiet)


def test_an_output_that_is_something_else_or_cannot_be_written_is_refused(job, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no folder"):
        embed(job(output=tmp_path / "file"), quiet)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other things \(thesis.tex\)"):
        embed(job(output=tmp_path / "full"), quiet)
    with pytest.raises(UserError, match="--output .*cannot be written"):
        embed(job(output=tmp_path / "file" / "below"), quiet)


def test_a_dry_run_tells_galaxies_bytes_and_time_and_writes_nothing(job):
    lines = list(estimate(replace(job(), batch=16)))
    assert lines[0].startswith("150 galaxies of ")
    assert ("GB to read" in lines[1] and "for one task" in lines[2]) or "too few" in lines[2]
    assert not job().output.exists()


def test_several_layers_and_patch_embeddings_in_float16(job, model, expected):
    embed(job(layers=(0, "last"), pooling="none", tokens=4, dtype="float16"), quiet)
    table = read_embeddings(job().output, kind="numpy")
    assert table["embedding_0"].shape == (150, 4, 32) and table["embedding_0"].dtype == np.float16
    assert np.isfinite(table["embedding_1"]).all()
