"""From images to a table: right numbers by id, every galaxy accounted for, nothing done twice."""

import csv
import json
import os
import shutil
import signal
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest

from astropt_ds import read_embeddings
from astropt_ds.config import DataConfig
from astropt_ds.data.decode import decode
from astropt_ds.data.open_shards import OpenShards, read_labels
from astropt_ds.data.remote import open_store
from astropt_ds.data.split import Split
from astropt_ds.embedding.claims import Claims
from astropt_ds.embedding.estimate import estimate
from astropt_ds.embedding.parts import Parts
from astropt_ds.embedding.run import embed
from astropt_ds.errors import RunAgain, UserError
from astropt_ds.table.index import INDEX
from tests.conftest import write_images
from tests.unit.embedding.conftest import tiny_model

pytestmark = pytest.mark.usefixtures("many_parts")


def quiet(line):
    pass


def table_of(job):
    embed(job, quiet)
    return read_embeddings(job.output, kind="numpy")


def failures_of(job):
    with (job.output / "_failures.csv").open() as file:
        return {row["id"]: row["reason"] for row in csv.DictReader(file)}


@pytest.fixture(scope="session")
def expected(model, shards):
    """Each galaxy's embedding by its id, the plain way."""
    store, found, opened = open_store(str(shards), DataConfig()), {}, OpenShards(20)
    for name in ("train", "val", "test"):
        split = Split(store, name)
        for row in range(len(split)):
            descriptor = opened.descriptor(split, split.shard_of(row))
            image = decode(opened.image(split, row, descriptor))
            (labels,) = read_labels(descriptor, split, np.array([row]))
            states = model.hidden_states(model.tokens(image[None]), "last")
            found[labels["id"]] = (name, states.mean(dim=1)[0].detach().numpy())
    opened.close()
    return found


@pytest.fixture
def copied(shards, tmp_path):
    """Shards that may be damaged."""
    return shutil.copytree(shards, tmp_path / "copy")


def check(table, expected):
    assert sorted(table["id"]) == sorted(expected)
    for row in table:
        split, embedding = expected[row["id"]]
        assert row["split"] == split
        np.testing.assert_allclose(row["embedding"], embedding, atol=1e-5, rtol=0)


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


def test_a_part_that_is_gone_is_made_again_and_only_that(job):
    embed(job(), quiet)
    parts = sorted(job().output.glob("part-*"))
    before = {part: (part.stat().st_mtime_ns, part.read_bytes()) for part in parts}
    parts[3].unlink()
    embed(job(), quiet)
    changed = [part for part in parts if part.stat().st_mtime_ns != before[part][0]]
    assert changed == [parts[3]] and parts[3].read_bytes() == before[parts[3]][1]


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


def test_a_flipped_byte_is_a_failure_and_never_another_embedding(job, copied, expected):
    store = open_store(str(copied), DataConfig())
    split = Split(store, "train")
    path = copied / split.entry.shards[0].name
    data = bytearray(path.read_bytes())
    row = split.index[13]
    data[int(row["offset"]) + int(row["size"]) // 2] ^= 1
    whole = path.read_bytes()
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="1 galaxies could not be looked at"):
        embed(job(data=(str(copied),)), quiet)
    ((identifier, reason),) = failures_of(job()).items()
    assert "do not match the checksum" in reason
    others = {i: known for i, known in expected.items() if i != identifier}
    check(read_embeddings(job().output, kind="numpy"), others)
    path.write_bytes(whole)  # a better copy of the shard
    check(table_of(job(data=(str(copied),))), expected)


def test_the_header_of_a_tar_that_is_damaged_costs_no_galaxy_for_good(job, copied, expected):
    split = Split(open_store(str(copied), DataConfig()), "train")
    path = copied / split.entry.shards[0].name
    whole = path.read_bytes()
    row = split.index[3]
    header = int(row["offset"]) + -(-int(row["size"]) // 512) * 512
    path.write_bytes(whole[:header] + b"?" * 512 + whole[header + 512 :])
    with pytest.raises(UserError, match="could not be looked at"):
        embed(job(data=(str(copied),)), quiet)
    assert all("the shard is damaged" in reason for reason in failures_of(job()).values())
    path.write_bytes(whole)
    check(table_of(job(data=(str(copied),))), expected)


def test_an_index_that_is_gone_is_made_again(job):
    one = str(table_of(job())["id"][0])
    (job().output / INDEX).unlink()
    embed(job(), quiet)
    assert list(read_embeddings(job().output, ids=one)["id"]) == [one]


def test_a_missing_shard_is_counted_and_tried_again_when_it_is_there(job, copied, expected):
    path = copied / "train-000002.tar"
    path.rename(copied / "away")
    with pytest.raises(UserError, match="20 galaxies could not be looked at .*tries them again"):
        embed(job(data=(str(copied),)), quiet)
    assert len(read_embeddings(job().output)) == len(expected) - 20
    assert all("train-000002.tar" in reason for reason in failures_of(job()).values())
    (copied / "away").rename(path)
    table = table_of(job(data=(str(copied),)))
    assert sorted(table["id"]) == sorted(expected) and not failures_of(job())


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


def test_a_part_that_was_damaged_where_it_lies_is_told_when_it_is_read(job):
    embed(job(), quiet)
    path = sorted(job().output.glob("part-*"))[2]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=f"{path.name}: cannot be read"):
        read_embeddings(job().output)
    path.unlink()
    embed(job(), quiet)
    assert len(read_embeddings(job().output)) == 150


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


def test_a_signal_ends_the_work_and_the_next_call_finishes_it(job, expected, monkeypatch):
    commit = Parts.commit

    def interrupted(self, part, *rest):
        commit(self, part, *rest)
        if part == 2:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    main_thread = threading.main_thread()
    assert threading.current_thread() is main_thread
    monkeypatch.setattr(Parts, "commit", interrupted)
    with pytest.raises(RunAgain, match="SIGTERM"):
        embed(job(), quiet)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list((job().output / "_claims").iterdir())
    assert not (job().output / "_manifest.json").exists()
    with pytest.raises(UserError, match="same command finishes it"):
        read_embeddings(job().output)
    monkeypatch.undo()
    assert sorted(table_of(job())["id"]) == sorted(expected)


def test_a_part_that_another_task_finishes_before_its_claim_is_not_made_again(
    job, tmp_path, monkeypatch
):
    embed(job(output=tmp_path / "theirs"), quiet)
    ours, take = job().output, Claims.take

    def late(self, name):
        if name == "part-000003":
            for file in (f"{name}.parquet", f"_parts/{name}.json"):
                os.link(tmp_path / "theirs" / file, ours / file)
        return take(self, name)

    monkeypatch.setattr(Claims, "take", late)
    embed(job(), quiet)
    assert (ours / "part-000003.parquet").samefile(tmp_path / "theirs" / "part-000003.parquet")
    assert not (ours / "part-000004.parquet").samefile(tmp_path / "theirs" / "part-000004.parquet")


def test_half_written_parts_of_killed_tasks_are_swept_away(job):
    embed(job(), quiet)
    os.unlink(next(job().output.glob("part-*")))
    (job().output / "_part-000000.parquet.0a.partial").write_bytes(b"half")
    (job().output / "_parts" / "_part-000000.json.0a.partial").write_bytes(b"half")
    (job().output / "_index-dead").mkdir()
    embed(job(), quiet)
    assert not list(job().output.rglob("*.partial")) and not list(job().output.glob("_index-*"))


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
