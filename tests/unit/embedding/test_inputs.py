"""Surveys as they lie, without shards of them: each galaxy's own pixels, by its own id."""

import csv
import io
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from astropy.io import fits

from astropt_ds import Embedder, read_embeddings, save_model
from astropt_ds.data.decode import decode
from astropt_ds.embedding.run import embed
from astropt_ds.errors import UserError
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from astropt_ds.table.manifest import TableManifest
from tests.conftest import blob
from tests.unit.embedding.conftest import tiny_model

COUNT = 40


@pytest.fixture(scope="module")
def images():
    return [simplejpeg.encode_jpeg(blob(i, 64), quality=92) for i in range(COUNT)]


@pytest.fixture(scope="module")
def expected(model, images):
    return Embedder(model).embed(np.stack([decode(data) for data in images]))


@pytest.fixture(scope="module")
def flux_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux") / "model"
    save_model(tiny_model(channels=2), folder)
    return folder


def fluxes(count=12):
    return np.random.default_rng(0).normal(size=(count, 2, 64, 64)).astype(np.float32)


def table_of(job):
    embed(job, lambda line: None)
    return read_embeddings(job.output).set_index("id")


def failures_of(job):
    with (job.output / "_failures.csv").open() as file:
        return {row["id"]: row["reason"] for row in csv.DictReader(file)}


def check(table, expected, ids):
    assert sorted(table.index) == sorted(ids)
    found = np.stack(table.loc[ids, "embedding"].to_list())
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("group", [7, 100])
def test_parquet_files_as_the_hub_has_them(job, images, expected, tmp_path, group, workers):
    ids = [f"b'{i}_{i + 1}'" if i % 2 else f"{i}_{i + 1}" for i in range(COUNT)]
    (tmp_path / "set").mkdir()
    for number, rows in enumerate((range(0, 23), range(23, COUNT))):
        table = pa.table(
            {
                "image": [{"bytes": images[i], "path": None} for i in rows],
                "dr8_id": [ids[i] for i in rows],
                "RA": [float(i) for i in rows],
                "mag": [None if i % 3 else i / 2 for i in rows],
            }
        )
        path = tmp_path / "set" / f"train-{number:05d}.parquet"
        pq.write_table(table, path, row_group_size=group)
    options = {"data": (str(tmp_path / "set"),), "columns": ("mag",), "workers": workers}
    table = table_of(job(**options))
    check(table, expected, [f"{i}_{i + 1}" for i in range(COUNT)])
    assert table.loc["5_6", "ra"] == 5.0 and np.isnan(table.loc["5_6", "mag"])
    assert table.loc["6_7", "mag"] == 3.0


def test_ids_and_a_catalogue_go_with_parquet_files(job, images, expected, tmp_path):
    table = pa.table({"image": images, "id": [f"g{i}" for i in range(COUNT)]})
    pq.write_table(table, tmp_path / "set.parquet")
    pd.DataFrame({"id": [f"g{i}" for i in range(30)], "z": np.arange(30)}).to_parquet(
        tmp_path / "sky.parquet"
    )
    pd.DataFrame({"object_id": ["g3", "g35", "h"]}).to_csv(tmp_path / "ids.csv", index=False)
    options = {"data": (str(tmp_path / "set.parquet"),), "ids": tmp_path / "ids.csv"}
    table = table_of(job(**options, survey={"catalogue": tmp_path / "sky.parquet"}))
    check(table, expected[[3, 35]], ["g3", "g35"])
    assert table.loc["g3", "z"] == 3 and pd.isna(table.loc["g35", "z"])
    assert failures_of(job()) == {"h": "is not in the data"}


def test_hdf5_files_of_fluxes(job, flux_model, tmp_path):
    stack = fluxes()
    with h5py.File(tmp_path / "set.hdf5", "w") as file:
        file["image_array"] = stack
        file["image_band"] = np.array([[b"g", b"r"]] * 12)
        file["object_id"] = np.array([f"{i:04d} ".encode() for i in range(12)])
        file["ra"], file["dec"] = np.arange(12.0), -np.arange(12.0)
    table = table_of(job(model=str(flux_model), data=(str(tmp_path / "set.hdf5"),)))
    expected = Embedder(flux_model).embed(np.moveaxis(stack, 1, 3))
    check(table, expected, [f"{i:04d}" for i in range(12)])
    assert table.loc["0007", "dec"] == -7


def test_fits_files_with_gaps_are_failures_unless_gaps_are_sky(job, flux_model, tmp_path):
    stack = fluxes()
    (tmp_path / "set").mkdir()
    stack[3, 1, 2, 2] = np.nan
    for i, planes in enumerate(stack):
        fits.PrimaryHDU(planes).writeto(tmp_path / "set" / f"ngc{i}.fits")
    (tmp_path / "set" / "ngc5.fits").write_bytes(b"SIMPLE = no")
    options = {"model": str(flux_model), "data": (str(tmp_path / "set"),)}
    table = table_of(job(**options))
    failed = failures_of(job())
    assert set(failed) == {"ngc3", "ngc5"} and "not finite" in failed["ngc3"]
    kept = [i for i in range(12) if i not in (3, 5)]
    expected = Embedder(flux_model).embed(np.moveaxis(np.nan_to_num(stack), 1, 3))
    check(table, expected[kept], [f"ngc{i}" for i in kept])
    zero = job(**options, survey={"nan": "zero"}, output=tmp_path / "zero")
    np.testing.assert_allclose(table_of(zero).loc["ngc3", "embedding"], expected[3], atol=1e-5)


def test_fluxes_are_shown_in_colour_to_a_model_of_colours(job, tmp_path):
    stack = np.abs(fluxes(4)).repeat(2, axis=1)[:, :3]
    (tmp_path / "set").mkdir()
    for i, planes in enumerate(stack):
        fits.PrimaryHDU(planes).writeto(tmp_path / "set" / f"ngc{i}.fits")
    survey = {"stretch": "asinh", "rgb": ("3", "2", "1")}
    assert len(table_of(job(data=(str(tmp_path / "set"),), survey=survey))) == 4


def test_a_folder_of_images_with_a_catalogue_that_names_them(job, images, expected, tmp_path):
    (tmp_path / "set").mkdir()
    for i, data in enumerate(images):
        (tmp_path / "set" / f"{i}.jpg").write_bytes(data)
    rows = [{"id": f"n{i}", "file": f"{i}.jpg", "z": i / 10, "bright": i % 2} for i in range(COUNT)]
    rows += [{"id": "lost", "file": "lost.jpg", "z": 1.0, "bright": 1}]
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    survey = {"catalogue": tmp_path / "table.csv", "filter": "bright == 1"}
    table = table_of(job(data=(str(tmp_path / "set"),), survey=survey))
    odd = range(1, COUNT, 2)
    check(table, expected[list(odd)], [f"n{i}" for i in odd])
    assert list(table) == ["z", "bright", "embedding"] and table.loc["n7", "z"] == 0.7
    assert failures_of(job()) == {"lost": "No such file or directory"}


def test_png_stamps_and_strict_decodes_give_the_same(job, images, expected, tmp_path):
    from PIL import Image

    (tmp_path / "set").mkdir()
    for i, data in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(decode(data)).save(file, "PNG")
        (tmp_path / "set" / f"{i:02d}.png").write_bytes(file.getvalue())
    ids = [f"{i:02d}" for i in range(COUNT)]
    check(table_of(job(data=(str(tmp_path / "set"),), strict=True)), expected, ids)


def test_shards_without_ids_of_ours_are_embedded_and_chosen_by_theirs(job, shards, tmp_path, model):
    """Plain WebDataset shards, listed: an id beside the image is the galaxy's."""
    import webdataset

    from astropt_ds.data.foreign import index_shards

    (tmp_path / "plain").mkdir()
    with webdataset.TarWriter(str(tmp_path / "plain" / "train-0.tar")) as tar:
        for i in range(10):
            labels = {} if i == 4 else {"id": f"name {i}", "ra": i}
            image = simplejpeg.encode_jpeg(blob(i, 64))
            tar.write({"__key__": f"k{i}", "jpg": image, "json": json.dumps(labels).encode()})
    index_shards(tmp_path / "plain", output=tmp_path / "listed")
    table = table_of(job(data=(str(tmp_path / "listed"),)))
    assert sorted(table.index) == sorted([f"name {i}" for i in range(10) if i != 4] + ["k4"])
    assert table.loc["name 7", "ra"] == 7 and np.isnan(table.loc["k4", "ra"])
    (tmp_path / "ids").write_text("name 7\nk4\n")
    shutil.rmtree(job().output)
    chosen = table_of(job(data=(str(tmp_path / "listed"),), ids=tmp_path / "ids"))
    assert sorted(chosen.index) == ["k4", "name 7"]
    assert np.array_equal(chosen.loc["k4", "embedding"], table.loc["k4", "embedding"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"survey": {"filter": "z > 1"}},
            "--filter 'z > 1': goes with images that are a file each",
        ),
        ({"columns": ("mass",)}, "--columns mass: .* has no such column"),
        ({"survey": {"image_column": "stamp"}}, "--image-column stamp"),
        ({"splits": ("val",)}, "--splits: is for shards"),
    ],
)
def test_options_that_do_not_fit_are_refused(job, images, tmp_path, options, words):
    pq.write_table(pa.table({"image": images, "id": list(range(COUNT))}), tmp_path / "s.parquet")
    with pytest.raises(UserError, match=words):
        embed(job(data=(str(tmp_path / "s.parquet"),), **options), print)


def test_a_folder_of_nothing_known_is_refused(job, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").touch()
    with pytest.raises(
        UserError, match=r"neither shards \(no manifest.json, .*\) nor files .parquet"
    ):
        embed(job(data=(str(tmp_path / "notes"),)), print)


def hub_file(path, images, **columns):
    pq.write_table(pa.table({"image": images, **columns}), path)
    return str(path)


def test_a_column_that_is_empty_at_first_has_the_type_of_its_file(job, images, tmp_path):
    gaps = [None] * (COUNT - 1) + [0.5]
    big = [None] * (COUNT - 1) + [2**60 + 1]
    data = hub_file(tmp_path / "s.parquet", images, id=list(range(COUNT)), z=gaps, objid=big)
    embed(job(data=(data,), columns=("z", "objid")), lambda line: None)
    arrow = read_embeddings(job().output, kind="arrow")
    assert (arrow["z"].type, arrow["objid"].type) == (pa.float64(), pa.int64())
    last = table_of(job(data=(data,), columns=("z", "objid"))).loc[str(COUNT - 1)]
    assert last.z == 0.5 and last.objid == 2**60 + 1


@pytest.mark.parametrize("kind", ["parquet", "shards"])
def test_a_catalogue_that_lacks_a_galaxy_leaves_its_own_position_alone(job, images, tmp_path, kind):
    ids = [f"g{i}" for i in range(COUNT)]
    if kind == "parquet":
        data = hub_file(tmp_path / "s.parquet", images, id=ids, ra=np.arange(COUNT) + 0.5)
    else:
        source = hub_file(tmp_path / "s.parquet", images, id=ids, ra=np.arange(COUNT) + 0.5)
        make_shards(Job(output=tmp_path / "shards", parquet=(Path(source),)))
        data = str(tmp_path / "shards")
    pd.DataFrame({"id": ["g3"], "ra": [200.0], "z": [1.5]}).to_csv(tmp_path / "c.csv", index=False)
    table = table_of(job(data=(data,), survey={"catalogue": tmp_path / "c.csv"}))
    assert table.loc["g3", "ra"] == 200 and table.loc["g3", "z"] == 1.5
    assert table.loc["g4", "ra"] == 4.5 and np.isnan(table.loc["g4", "z"])
    assert TableManifest.load(job().output).unlisted == COUNT - 1


def test_ids_of_another_column_and_another_catalogue_are_another_table(job, images, tmp_path):
    ids = {"id": [f"a{i}" for i in range(COUNT)], "objid": [f"b{i}" for i in range(COUNT)]}
    data = (hub_file(tmp_path / "s.parquet", images, **ids),)
    (tmp_path / "sky").mkdir()
    frame = pd.DataFrame({**ids, "z": 1.0})
    frame.to_parquet(tmp_path / "sky" / "1.parquet")
    survey = {"catalogue": tmp_path / "sky"}
    embed(job(data=data, survey=survey), lambda line: None)
    for other, words in (
        ({**survey, "id_column": "objid"}, "--id-column None, not objid"),
        ({**survey, "catalogue_id_column": "id"}, "--catalogue-id-column None, not id"),
        ({}, "--catalogue"),
    ):
        with pytest.raises(UserError, match=words):
            embed(job(data=data, survey=other), lambda line: None)
    frame.assign(z=2.0).to_parquet(tmp_path / "sky" / "1.parquet")
    with pytest.raises(UserError, match="--catalogue"):
        embed(job(data=data, survey=survey), lambda line: None)


def test_a_file_that_shrinks_under_way_leaves_failures_and_no_nameless_galaxies(
    job, images, expected, tmp_path, monkeypatch
):
    from astropt_ds.ingest.parquet import ParquetFiles

    read = ParquetFiles.read

    def short(self, rows, facts):  # what a file gives that has been replaced meanwhile
        return (pair for pair in read(self, rows, facts) if pair[0]["__row__"] != 7)

    monkeypatch.setattr(ParquetFiles, "read", short)
    data = (hub_file(tmp_path / "s.parquet", images, id=[str(i) for i in range(COUNT)]),)
    with pytest.raises(UserError, match="1 galaxies could not be looked at"):
        embed(job(data=data), lambda line: None)
    monkeypatch.undo()
    check(table_of(job(data=data)), expected, [str(i) for i in range(COUNT)])


def test_images_of_several_sizes_are_told_before_they_are_cut(job, tmp_path):
    (tmp_path / "set").mkdir()
    for i, side in enumerate([64] * 9 + [96] * 3):
        (tmp_path / "set" / f"{i:02d}.jpg").write_bytes(simplejpeg.encode_jpeg(blob(i, side)))
    said = []
    embed(job(data=(str(tmp_path / "set"),)), said.append)
    assert "9 of 64, 3 of 96 pixels" in said[0] and "--image-size chooses another" in said[0]
    assert "of 64 pixels" in said[1]
    said.clear()
    embed(job(data=(str(tmp_path / "set"),), output=tmp_path / "other", image_size=48), said.append)
    assert len(said) == 1


def test_ids_as_windows_writes_them_and_from_folders_are_read(job, images, expected, tmp_path):
    data = (hub_file(tmp_path / "s.parquet", images, id=[f"g{i}" for i in range(COUNT)]),)
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfg3\r\n\r\n g5 \r\n")
    check(table_of(job(data=data, ids=tmp_path / "ids.txt")), expected[[3, 5]], ["g3", "g5"])
    (tmp_path / "ids").mkdir()
    pd.DataFrame({"id": ["g9"]}).to_parquet(tmp_path / "ids" / "1.parquet")
    other = job(data=data, ids=tmp_path / "ids", output=tmp_path / "other")
    check(table_of(other), expected[[9]], ["g9"])
    with pytest.raises(UserError, match="--ids .*nowhere.csv: cannot be read"):
        embed(job(data=data, ids=tmp_path / "nowhere.csv"), print)


def test_a_column_of_the_tables_own_name_is_refused(job, images, tmp_path):
    data = (hub_file(tmp_path / "s.parquet", images, id=list(range(COUNT))),)
    frame = pd.DataFrame({"id": range(COUNT), "embedding": 1.0})
    frame.to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(UserError, match="column embedding: the table has its own"):
        embed(job(data=data, survey={"catalogue": tmp_path / "c.csv"}), print)


def test_an_absent_column_is_answered_by_those_there_are_in_files_and_catalogue(
    job, images, tmp_path
):
    data = (hub_file(tmp_path / "s.parquet", images, id=list(range(COUNT)), mag=[1.0] * COUNT),)
    pd.DataFrame({"id": range(COUNT), "z": 1.0}).to_csv(tmp_path / "c.csv", index=False)
    survey = {"catalogue": tmp_path / "c.csv"}
    with pytest.raises(UserError, match="--columns mass: .* it has id, mag, z"):
        embed(job(data=data, survey=survey, columns=("mass",)), print)
