"""FITS images: a file an object, a file a band."""

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

from astropt_ds.data.decode import decode
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from tests.unit.ingest.shards import made


def fluxes(i, bands=3, side=20):
    return np.random.default_rng(i).normal(0, 1, (bands, side, side + 4)).astype(np.float32)


def expected(i, planes=slice(None)):
    return np.moveaxis(fluxes(i)[planes], 0, 2)


def write_object(path, i, names=("g", "r", "z"), keyword="EXTNAME", kind=fits.ImageHDU):
    path.parent.mkdir(parents=True, exist_ok=True)
    units = [fits.PrimaryHDU()]
    for plane, name in zip(fluxes(i), names, strict=True):
        unit = kind(plane)
        if name:
            unit.header[keyword] = name
        units.append(unit)
    fits.HDUList(units).writeto(path)


@pytest.mark.parametrize("keyword", ["EXTNAME", "FILTER", "BAND"])
@pytest.mark.parametrize("suffix", [".fits", ".fit", ".fits.gz", ".fits.fz"])
def test_a_file_an_object_has_its_bands_in_its_images(tmp_path, keyword, suffix):
    def compressed(plane):
        return fits.CompImageHDU(plane, compression_type="GZIP_1", quantize_level=0)

    kind = compressed if suffix.endswith("fz") else fits.ImageHDU
    for i in range(3):
        write_object(tmp_path / f"f/deep/NGC {i}.v2{suffix}", i, keyword=keyword, kind=kind)
    found = made(tmp_path / "s", fits=tmp_path / "f")
    assert Folder(tmp_path / "s").manifest.bands == ["g", "r", "z"]
    assert found.keys() == {f"deep/NGC {i}.v2" for i in range(3)}
    for i in range(3):
        sample = found[f"deep/NGC {i}.v2"]
        assert sample["labels"]["file"] == f"deep/NGC {i}.v2{suffix}"
        assert np.array_equal(decode(sample["image"]), expected(i))


def test_a_catalogue_names_files_and_bands_are_picked(tmp_path):
    for i in range(3):
        write_object(tmp_path / f"{i}.fits", i)
    table = pd.DataFrame({"objid": [7, 8, 9, 10], "path": [*(f"{i}.fits" for i in range(3)), None]})
    table.to_csv(tmp_path / "t.csv", index=False)
    options = {"catalogue": tmp_path / "t.csv", "file_column": "path", "bands": ("z", "g")}
    found = made(tmp_path / "s", fits=tmp_path, **options)
    assert found.keys() == {"7", "8", "9"}
    assert np.array_equal(decode(found["8"]["image"]), expected(1, [2, 0]))
    assert found["8"]["labels"] == {"id": "8", "objid": "8", "path": "1.fits"}
    listed = pd.read_csv(tmp_path / "s" / "rejected.csv")
    assert listed["id"][0] == 10 and listed["reason"][0] == "has no file name"


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2"])
def test_a_cube_of_any_type_becomes_float32_of_this_machine(tmp_path, dtype):
    cube = (fluxes(0) * 100).astype(dtype)
    fits.PrimaryHDU(cube).writeto(tmp_path / "a.fits")
    found = made(tmp_path / "s", fits=tmp_path, bands=("g", "r", "z"))
    image = decode(found["a"]["image"])
    assert image.dtype == np.float32 and image.dtype.isnative
    assert np.array_equal(image, np.moveaxis(cube, 0, 2).astype(np.float32))
    assert Folder(tmp_path / "s").manifest.bands == ["g", "r", "z"]


def write_bands(folder, i, bands="grz"):
    for band in bands:
        path = folder / f"{band}/obj-{i}-{band}.fits"
        path.parent.mkdir(parents=True, exist_ok=True)
        fits.PrimaryHDU(fluxes(i)["grz".index(band)]).writeto(path)


def test_a_file_a_band_is_found_by_its_pattern(tmp_path):
    for i in range(4):
        write_bands(tmp_path / "f", i, bands="grz" if i else "gz")
    fits.PrimaryHDU(fluxes(0)[0]).writeto(tmp_path / "f/sky.fits")
    options = {"file_pattern": "{band}/obj-{id}-{band}.fits", "bands": ("z", "r")}
    said = []
    job = Job(fits=tmp_path / "f", output=tmp_path / "s", **options)
    report = make_shards(job, said.append)
    assert report.rejected == 1
    assert said == [f"not used: {', '.join(f'g/obj-{i}-g.fits' for i in range(4))}, sky.fits"]
    reason = pd.read_csv(tmp_path / "s" / "rejected.csv")["reason"][0]
    assert reason == "band r: No such file or directory"
    pd.DataFrame({"id": [3, 1], "z": [0.3, 0.1]}).to_csv(tmp_path / "t.csv", index=False)
    found = made(tmp_path / "t", fits=tmp_path / "f", catalogue=tmp_path / "t.csv", **options)
    assert found.keys() == {"1", "3"}
    assert found["3"]["labels"] == {"id": "3", "z": 0.3}
    assert np.array_equal(decode(found["3"]["image"]), expected(3, [2, 1]))


def test_what_cannot_be_used_is_left_out_and_listed(tmp_path):
    folder = tmp_path / "f"
    write_object(folder / "a.fits", 0)
    write_object(folder / "other.fits", 1, names=("g", "r", "y"))
    write_object(folder / "cut.fits", 2)
    (folder / "cut.fits").write_bytes((folder / "cut.fits").read_bytes()[:-2800])
    (folder / "text.fits").write_text("id,ra\n")
    fits.PrimaryHDU().writeto(folder / "empty.fits")
    planes = [fits.ImageHDU(np.zeros((20, 20 + n), "f4")) for n in (0, 0, 4)]
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(folder / "sizes.fits")
    assert made(tmp_path / "s", fits=folder).keys() == {"a"}
    reasons = pd.read_csv(tmp_path / "s" / "rejected.csv").set_index("id")["reason"]
    assert reasons["other"] == "has bands g r y; g r z as the others would be right"
    assert reasons["cut"].startswith("cannot be read (")
    assert reasons["text"].startswith("cannot be read (")
    assert reasons["empty"].startswith("holds no image")
    assert reasons["sizes"] == "has bands of different sizes: 20 x 20, 20 x 24"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fits": "none"}, "--fits .*none: is no folder"),
        ({"fits": "void"}, "no images in --fits .*void"),
        ({"bands": ("u", "g")}, "none of 1 is usable; the first, a.fits: has bands g r z, not u g"),
        ({"file_pattern": "{id}.fits"}, r"--file-pattern {id}.fits: needs {id} and {band} in it"),
        ({"file_pattern": "{id}-{band}.fits"}, "--file-pattern .* and --bands"),
        ({"file_pattern": "{id}_{band}.fit", "bands": ("g",)}, "no images in --fits"),
        ({"id_column": "id"}, "--id-column is about a table: --catalogue beside --fits"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, change, message):
    write_object(tmp_path / "f/a.fits", 0)
    (tmp_path / "void").mkdir()
    options = {"fits": "f", **change}
    options["fits"] = tmp_path / options["fits"]
    with pytest.raises(UserError, match=message) as error:
        make_shards(Job(output=tmp_path / "s", **options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("s*"))
