"""HDF5 files of the Multimodal Universe and of Stein et al."""

import io
import itertools

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from astropt_ds.data.decode import decode
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from tests.unit.ingest.shards import made, samples

BANDS = ("DES-G", "DES-R", "DES-I", "DES-Z")


def fluxes(i, bands=4, side=20):
    return np.random.default_rng(i).normal(0, 1, (bands, side, side)).astype(np.float32)


def write_mmu(path, numbers, bands=BANDS, dtype="<f4", **columns):
    """A file of the Multimodal Universe's legacysurvey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        images = np.array([fluxes(i) for i in numbers]).astype(dtype)
        file.create_dataset("image_array", data=images, chunks=(1, *images.shape[1:]))
        file["image_band"] = np.array([[b.encode() for b in bands]] * len(numbers))
        file["image_ivar"] = images
        file["object_id"] = np.array([f"{i}".encode() for i in numbers])
        file["ra"] = np.array([10.0 * i for i in numbers], ">f8")
        file["dec"] = np.zeros(len(numbers))
        for name, values in columns.items():
            file[name] = values


@pytest.fixture
def universe(tmp_path):
    """A folder of two files of 6 objects each, ids 0 to 11."""
    write_mmu(tmp_path / "mmu/healpix=12/001-of-001.hdf5", range(6), type=[b"SER "] * 6)
    write_mmu(tmp_path / "mmu/healpix=7/001-of-001.hdf5", range(6, 12), type=[b"REX"] * 6)
    return tmp_path / "mmu"


def test_the_multimodal_universe_keeps_ids_fluxes_bands_and_labels(universe, tmp_path):
    said = []
    job = Job(hdf5=(universe,), output=tmp_path / "s", samples_per_shard=4)
    report = make_shards(job, said.append)
    assert said == ["not used: image_ivar"] and report.rejected == 0
    manifest = Folder(job.output).manifest
    assert (manifest.dtype, manifest.channels, manifest.nan) == ("float32", 4, "none")
    assert tuple(manifest.bands) == BANDS and manifest.stretch is None
    found = samples(job.output)
    assert found.keys() == {str(i) for i in range(12)}
    for i, sample in ((int(i), s) for i, s in found.items()):
        assert sample["suffix"] == "npy"
        image = decode(sample["image"])
        assert image.shape == (20, 20, 4)
        assert np.array_equal(image, np.moveaxis(fluxes(i), 0, 2))
        kind = "SER" if i < 6 else "REX"
        expected = {"id": str(i), "object_id": str(i), "ra": 10.0 * i, "dec": 0.0, "type": kind}
        assert sample["labels"] == expected


def test_bands_are_picked_and_ordered(universe, tmp_path):
    found = made(tmp_path / "s", hdf5=(universe,), bands=("DES-Z", "DES-G"), filter="ra > 100")
    assert list(found) == ["11"]
    assert np.array_equal(decode(found["11"]["image"]), np.moveaxis(fluxes(11)[[3, 0]], 0, 2))
    assert Folder(tmp_path / "s").manifest.bands == ["DES-Z", "DES-G"]


def test_rows_of_other_bands_or_types_are_left_out_and_listed(universe, tmp_path):
    write_mmu(universe / "z.hdf5", [20], bands=("DES-G", "DES-R", "DES-I", "DES-Y"))
    write_mmu(universe / "z2.hdf5", [21], dtype="u1")
    assert len(made(tmp_path / "s", hdf5=(universe,))) == 12
    listed = pd.read_csv(tmp_path / "s" / "rejected.csv").set_index("id")
    assert "bands DES-G DES-R DES-I DES-Y; DES-G DES-R DES-I DES-Z as" in listed["reason"][20]
    assert listed["reason"][21] == "holds uint8; float32 as the others would be right"
    assert listed["file"][20] == "z.hdf5, row 0"


def test_what_most_images_have_is_right_not_what_the_first_has(universe, tmp_path):
    others = ("DES-G", "DES-R", "DES-I", "DES-Y")
    write_mmu(universe / "a first one.hdf5", [20], bands=others)
    assert set(made(tmp_path / "s", hdf5=(universe,))) == {str(i) for i in range(12)}
    picked = made(tmp_path / "t", hdf5=(universe,), bands=("DES-G", "DES-Z"))
    assert set(picked) == {str(i) for i in range(12)}


def test_a_file_that_cannot_be_read_costs_no_other(universe, tmp_path):
    whole = universe / "healpix=12/001-of-001.hdf5"
    for name in ("healpix=1/a.hdf5", "healpix=99/z.hdf5"):
        path = universe / name
        path.parent.mkdir()
        path.write_bytes(whole.read_bytes()[:1000])
    assert len(made(tmp_path / "s", hdf5=(universe,))) == 12
    listed = pd.read_csv(tmp_path / "s" / "rejected.csv")
    assert len(listed) == 2 and listed["reason"].str.contains("cannot be read").all()
    assert listed["file"].str.endswith(("a.hdf5", "z.hdf5")).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("option", ["softening", "scales"])
def test_numbers_that_would_make_nothing_of_the_images_are_refused(tmp_path, option, value):
    write_stein(tmp_path / "a.h5", np.array([fluxes(0, bands=3)]))
    number = (value, 1.0, 1.0) if option == "scales" else value
    options = {"stretch": "lupton", "rgb": ("1", "2", "3"), option: number}
    with pytest.raises(UserError, match=f"--{option} .*above 0"):
        make_shards(Job(hdf5=(tmp_path / "a.h5",), output=tmp_path / "s", **options))


def test_an_image_without_any_value_is_left_out_even_if_gaps_are_kept(tmp_path):
    images = np.array([fluxes(i, bands=3) for i in range(2)])
    images[1] = np.nan
    write_stein(tmp_path / "a.h5", images)
    assert list(made(tmp_path / "s", hdf5=(tmp_path / "a.h5",), nan="zero")) == ["a-0"]
    reason = pd.read_csv(tmp_path / "s" / "rejected.csv")["reason"][0]
    assert reason == "holds no finite value"


def test_sky_tiles_of_files_stay_on_one_side(universe, tmp_path):
    options = {"val_fraction": 0.4, "test_fraction": 0.2, "healpix_order": 0}
    found = made(tmp_path / "s", hdf5=(universe,), **options)
    sides = pd.DataFrame([(round(s["labels"]["ra"] / 90), s["split"]) for s in found.values()])
    assert len(found) == 12 and (sides.groupby(0)[1].nunique() == 1).all()


def test_ids_that_careless_code_wrote_join_a_catalogue(universe, tmp_path):
    catalogue = pd.DataFrame({"objid": [f"b'{i}'" for i in range(12)], "z": np.arange(12) / 10})
    catalogue.to_csv(tmp_path / "t.csv", index=False)
    options = {"catalogue": tmp_path / "t.csv", "catalogue_id_column": "objid", "columns": ("z",)}
    found = made(tmp_path / "s", hdf5=(universe,), **options)
    assert {i: s["labels"] for i, s in found.items()} == {
        str(i): {"id": str(i), "z": i / 10} for i in range(12)
    }


def write_stein(path, images, **columns):
    with h5py.File(path, "w") as file:
        file["images"] = images
        for name, values in columns.items():
            file[name] = values


def test_the_stein_layout_names_images_by_inds_or_by_file_and_row(tmp_path):
    images = np.array([fluxes(i, bands=3) for i in range(4)])
    write_stein(tmp_path / "a.h5", images, inds=np.arange(4) + 2**60, z_spec=[0.1, 0.2, 0.3, 0.4])
    found = made(tmp_path / "s", hdf5=(tmp_path / "a.h5",), bands=("g", "r", "z"))
    assert list(found) == [str(2**60 + i) for i in range(4)]
    assert found[str(2**60)]["labels"]["z_spec"] == 0.1
    assert Folder(tmp_path / "s").manifest.bands == ["g", "r", "z"]
    write_stein(tmp_path / "b.h5", images)
    found = made(tmp_path / "t", hdf5=(tmp_path / "b.h5",), bands=("3", "1"))
    assert list(found) == ["b-0", "b-1", "b-2", "b-3"]
    assert np.array_equal(decode(found["b-2"]["image"]), np.moveaxis(images[2][[2, 0]], 0, 2))


def test_8_bit_arrays_become_png(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 20, 24), dtype=np.uint8)
    write_stein(tmp_path / "a.h5", images)
    found = made(tmp_path / "s", hdf5=(tmp_path / "a.h5",))
    manifest = Folder(tmp_path / "s").manifest
    assert (manifest.dtype, manifest.channels, manifest.nan) == ("uint8", 3, "none")
    for i in range(3):
        sample = found[f"a-{i}"]
        assert sample["suffix"] == "png"
        stored = np.asarray(Image.open(io.BytesIO(sample["image"])))
        assert np.array_equal(stored, np.moveaxis(images[i], 0, 2))


def test_pixels_that_are_not_finite_are_refused_or_kept_to_be_read_as_zero(tmp_path):
    images = np.array([fluxes(i, bands=3) for i in range(3)])
    images[1, 0, 2, 3] = np.nan
    images[1, 2, 0, 0] = np.inf
    write_stein(tmp_path / "a.h5", images)
    source = {"hdf5": (tmp_path / "a.h5",)}
    assert list(made(tmp_path / "s", **source)) == ["a-0", "a-2"]
    reason = pd.read_csv(tmp_path / "s" / "rejected.csv")["reason"][0]
    assert reason == "2 values are not finite; --nan zero would keep it"
    kept = made(tmp_path / "t", nan="zero", **source)
    assert Folder(tmp_path / "t").manifest.nan == "zero"
    image = decode(kept["a-1"]["image"])
    assert np.array_equal(image, np.moveaxis(images[1], 0, 2), equal_nan=True)


@pytest.mark.parametrize("name", ["asinh", "lupton"])
def test_a_stretch_makes_8_bit_colour_and_is_in_the_manifest(tmp_path, name):
    images = np.zeros((2, 3, 32, 32), np.float32)
    images[0, 2] = 3.0  # z
    images[1, 0, 0, 0] = np.nan
    write_stein(tmp_path / "a.h5", images)
    options = {"bands": ("g", "r", "z"), "rgb": ("z", "r", "g"), "stretch": name, "nan": "zero"}
    found = made(tmp_path / "s", hdf5=(tmp_path / "a.h5",), scales=(2.0, 1.0, 1.0), **options)
    manifest = Folder(tmp_path / "s").manifest
    assert (manifest.dtype, manifest.bands, manifest.nan) == ("uint8", ["R", "G", "B"], "none")
    assert manifest.stretch == {
        **{"name": name, "red": "z", "green": "r", "blue": "g", "scales": [2.0, 1.0, 1.0]},
        **{"minimum": -0.022, "stretch": 0.29, "Q": 5.8, "nan": "zero"},
    }
    red, dark = (decode(found[f"a-{i}"]["image"]).astype(int) for i in range(2))
    assert found["a-0"]["suffix"] == "jpg"
    assert red[..., 0].min() > 200 and red[..., 1:].max() < 60
    assert dark.std() < 2  # the pixel that was not finite is as the sky


def test_a_damaged_chunk_costs_no_other(tmp_path):
    path = tmp_path / "a.h5"
    images = np.array([fluxes(i, bands=3) for i in range(6)])
    with h5py.File(path, "w") as file:
        shape = (2, *images.shape[1:])
        data = file.create_dataset("images", data=images, chunks=shape, fletcher32=True)
        offset = data.id.get_chunk_info(1).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = b"\0\0\0\0"
    path.write_bytes(content)
    assert list(made(tmp_path / "s", hdf5=(path,))) == ["a-0", "a-1", "a-4", "a-5"]
    reasons = pd.read_csv(tmp_path / "s" / "rejected.csv")["reason"]
    assert reasons.str.startswith("cannot be read (").all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bands": ("u",)}, "--hdf5 .*hdf5: has bands DES-G DES-R DES-I DES-Z, not u"),
        ({"id_column": "name"}, "--id-column name: .* has no such column; it has dec, object_id"),
        ({"hdf5": ("bad.h5",)}, "bad.h5: cannot be read"),
        ({"hdf5": ("other.h5",)}, "other.h5: has no dataset image_array or images of .* it has x"),
        ({"hdf5": ("four.h5",)}, "8-bit images of 4 bands; three of them by --bands .* 1 2 3 4"),
        ({"stretch": "lupton"}, "--stretch lupton: needs --rgb and three bands, red first"),
        ({"rgb": ("a", "b", "c")}, "--rgb needs --stretch asinh or lupton"),
        ({"softening": 3.0}, "--softening needs --stretch"),
        ({"stretch": "asinh", "rgb": ("z", "r", "g")}, "--rgb z: the bands are DES-G DES-R"),
        (
            {"hdf5": ("four.h5",), "bands": ("1", "2", "3"), **{"stretch": "asinh", "rgb": "123"}},
            "--stretch asinh: .* holds 8-bit images; it is for fluxes",
        ),
        ({"healpix_order": 30}, "--healpix-order 30: 0 to 29 would be right"),
        ({"healpix_order": 3, "group_column": "type"}, "--group-column and --healpix-order: one"),
        ({"split_column": "ra"}, "--split-column ra: holds '0' in 1 rows; train, val, test"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(universe, tmp_path, change, message):
    (tmp_path / "bad.h5").write_bytes(b"\x89HDF")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1]
    write_stein(tmp_path / "four.h5", np.zeros((1, 4, 20, 20), np.uint8))
    options = {"hdf5": (universe,), **change}
    options["hdf5"] = tuple(tmp_path / path for path in options["hdf5"])
    with pytest.raises(UserError, match=message) as error:
        make_shards(Job(output=tmp_path / "s", **options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("s*"))


def test_any_order_and_number_of_rows_is_read(universe):
    from astropt_ds.ingest.hdf5 import HDF5Files

    source = HDF5Files((universe,))
    table = source.table(lambda column: False)
    facts = source.facts(table)
    for chosen in itertools.islice(itertools.permutations(range(12), 3), 0, None, 97):
        read = {row["__id__"]: p.pixels for row, p in source.read(table.iloc[[*chosen]], facts)}
        assert read.keys() == {str(i) for i in chosen}
        for i, pixels in read.items():
            assert np.array_equal(pixels, np.moveaxis(fluxes(int(i)), 0, 2))
