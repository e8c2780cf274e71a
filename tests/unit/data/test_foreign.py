import csv
import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import simplejpeg
import torch
import webdataset
from PIL import Image

from astropt_ds.data.decode import decode, encode_fluxes
from astropt_ds.data.foreign import index_shards
from astropt_ds.data.manifest import MANIFEST
from astropt_ds.data.rejected import REJECTED
from astropt_ds.data.split import Split
from astropt_ds.data.store import Folder
from astropt_ds.data.verify import verify
from astropt_ds.errors import UserError
from astropt_ds.tokens import grid
from tests.conftest import REPOSITORY, TINY, blob
from tests.unit.data.loading import galaxies, steps


def jpeg(seed, side=64):
    return simplejpeg.encode_jpeg(blob(seed, side), quality=90)


def write(path, samples):
    """A shard as webdataset writes it: {key: {suffix: bytes}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for key, parts in samples.items():
            tar.write({"__key__": key, **parts})


def plain(numbers, **more):
    return {f"g{i:03d}": {"jpg": jpeg(i), "cls": b"1", **more} for i in numbers}


@pytest.fixture
def foreign(tmp_path):
    """Shards of 12, 5 and 3 images and an empty one, with splits told by folder and file."""
    root = tmp_path / "theirs"
    write(root / "train" / "a-0000.tar", plain(range(7)))
    write(root / "train" / "a-0001.tar", plain(range(7, 12)))
    write(root / "galaxies-val-0.tar", plain(range(12, 17)))
    write(root / "galaxies-test-0.tar", plain(range(17, 20)))
    write(root / "galaxies-test-1.tar", {})
    return root


def rejected(folder):
    with (folder / REJECTED).open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.mark.parametrize("beside", [True, False])
def test_plain_shards_become_a_data_set_where_they_lie(tiny, foreign, tmp_path, beside):
    before = files(foreign)
    output = None if beside else tmp_path / "ours"
    report = index_shards(foreign, output=output)
    assert report.samples == {"train": 12, "val": 5, "test": 3} and report.named
    folder = output or foreign
    written = {"manifest.json", "train.index.npy", "val.index.npy", "test.index.npy"}
    after = files(foreign)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == (written if beside else set())
    assert {path.name for path in folder.iterdir()} >= written
    assert verify(folder, decode=True).faults == []
    split = Split(Folder(folder), "train")
    assert [shard.name for shard in split.entry.shards] == ["train/a-0000.tar", "train/a-0001.tar"]
    assert [split.place(row)[1] for row in range(12)] == [f"g{i:03d}" for i in range(12)]
    cut = grid(64, 16, "rows")
    ((batch,),) = steps(galaxies((*tiny, f"data.path={folder}")), 0, 1)
    assert batch.faults == []
    for row, patches in zip(batch.rows.tolist(), batch.patches, strict=True):
        assert torch.equal(patches, torch.from_numpy(cut.to_patches(decode(jpeg(row)))))


def test_keys_are_those_of_webdataset(tmp_path):
    """Folders, dots and long names included."""
    names = ["deep/er/a", "v1.2/b", "c" * 150, "galaxie-\u00e9"]
    write(tmp_path / "train.tar", {n: {"image.JPG": jpeg(i)} for i, n in enumerate(names)})
    index_shards(tmp_path)
    data = webdataset.WebDataset(str(tmp_path / "train.tar"), shardshuffle=False)
    split = Split(Folder(tmp_path), "train")
    assert [split.place(row)[1] for row in range(4)] == [sample["__key__"] for sample in data]
    assert verify(tmp_path).faults == []


def test_shards_made_here_get_the_same_index_again(shards, tmp_path):
    index_shards(shards, output=tmp_path / "again", processes=2)
    for split in ("train", "val", "test"):
        name = f"{split}.index.npy"
        assert (tmp_path / "again" / name).read_bytes() == (shards / name).read_bytes()
    ours, theirs = Folder(shards).manifest, Folder(tmp_path / "again").manifest
    assert ours.hash(("train", "val")) == theirs.hash(("train", "val"))


def test_where_a_name_tells_nothing_all_are_train(foreign):
    write(foreign / "more.tar", plain(range(30, 32)))
    report = index_shards(foreign)
    assert report.samples == {"train": 22, "val": 0, "test": 0} and not report.named


def test_globs_go_before_names(foreign):
    globs = {"val": "train/*", "train": "galaxies-*"}
    assert index_shards(foreign, globs=globs).samples == {"train": 8, "val": 12, "test": 0}


@pytest.mark.parametrize(
    "globs, message",
    [
        ({"train": "tain/*"}, "--train 'tain/.*': matches none of 5 shards"),
        (
            {"train": "train/*", "val": "*-val-*"},
            r"galaxies-test-0.tar: none of .* \(2 such in all\)",
        ),
        ({"train": "*", "val": "*-val-*"}, "--val '.*': galaxies-val-0.tar is in another split"),
    ],
)
def test_globs_put_each_shard_into_one_split(foreign, globs, message):
    with pytest.raises(UserError, match=message):
        index_shards(foreign, globs=globs)


def test_what_cannot_be_used_is_left_out_and_listed(tmp_path):
    grey = io.BytesIO()
    Image.fromarray(blob(1)[..., 0]).save(grey, "png")
    samples = plain(range(3))
    samples["broken"] = {"jpg": jpeg(3)[:300]}
    samples["grey"] = {"png": grey.getvalue()}
    samples["fluxes"] = {"npy": encode_fluxes(np.ones((8, 8, 5), np.float32))}
    samples["wide"] = {"npy": encode_fluxes(np.ones((1, 70000, 5), np.float32))}
    samples["bare"] = {"json": b"{}", "txt": b"no image"}
    write(tmp_path / "train-0.tar", samples)
    report = index_shards(tmp_path)
    assert report.samples["train"] == 3 and report.rejected == 5
    lines = {key: (shard, reason) for key, shard, reason in rejected(tmp_path)}
    assert {shard for shard, _ in lines.values()} == {"train-0.tar"}
    assert "cannot be decoded" in lines["broken"][1]
    assert lines["grey"][1] == "has mode L; a colour image would be right"
    assert lines["fluxes"][1] == "is float32 of 5 channels; most are uint8 of 3"
    assert lines["wide"][1] == "is 70000 x 1 pixels; 1 to 65535 would be right"
    assert lines["bare"][1] == "has no image, only json, txt"
    assert verify(tmp_path, decode=True).faults == []


def test_fluxes_are_listed_with_their_channels(tmp_path):
    images = {f"f{i}": {"npy": encode_fluxes(np.full((8, 9, 5), i, np.float32))} for i in range(3)}
    write(tmp_path / "train.tar", images)
    index_shards(tmp_path)
    manifest = Folder(tmp_path).manifest
    assert (manifest.dtype, manifest.channels, manifest.nan) == ("float32", 5, "none")
    assert len(set(manifest.bands)) == 5
    assert verify(tmp_path, decode=True).faults == []


@pytest.mark.parametrize("keep", [False, True])
def test_fluxes_with_nan_are_left_out_unless_they_are_wanted(tmp_path, keep):
    image = np.zeros((8, 8, 1), np.float32)
    gap = image.copy()
    gap[3, 3] = np.nan
    images = {"whole": {"npy": encode_fluxes(image)}, "gap": {"npy": encode_fluxes(gap)}}
    write(tmp_path / "train.tar", images)
    report = index_shards(tmp_path, keep_nan=keep)
    assert Folder(tmp_path).manifest.nan == ("zero" if keep else "none")
    assert (report.samples["train"], report.rejected) == ((2, 0) if keep else (1, 1))
    if not keep:
        reason = "1 values are not finite; --nan zero would keep it"
        assert rejected(tmp_path) == [("gap", "train.tar", reason)]


def test_an_image_that_is_in_two_splits_stays_in_the_one_that_measures(tmp_path):
    write(tmp_path / "train.tar", plain(range(4)))
    write(tmp_path / "val.tar", plain(range(3, 6)))
    assert index_shards(tmp_path).samples == {"train": 3, "val": 3, "test": 0}
    assert rejected(tmp_path) == [("g003", "train.tar", "is in val.tar already")]


def test_a_link_in_a_tar_file_is_left_out_and_listed(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(jpeg(0))
        tar.addfile(info, io.BytesIO(jpeg(0)))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    assert index_shards(tmp_path).samples["train"] == 1
    reason = "is a link in the tar file, without bytes of its own"
    assert rejected(tmp_path) == [("b", "train.tar", reason)]


def test_several_images_a_key_need_a_choice(tmp_path):
    write(
        tmp_path / "train.tar", plain(range(3), **{"mask.png": jpeg(0), "small.jpg": jpeg(1, 32)})
    )
    with pytest.raises(UserError, match="g000 has 3 images; --member jpg or --member mask.png or"):
        index_shards(tmp_path)
    index_shards(tmp_path, member="small.jpg")
    assert Split(Folder(tmp_path), "train").smallest == 32


def test_a_repeated_image_is_left_out_and_a_repeated_name_is_fine(tmp_path):
    write(tmp_path / "train-0.tar", plain(range(3)))
    write(tmp_path / "train-1.tar", plain(range(2, 5)))
    assert index_shards(tmp_path).samples["train"] == 5
    assert rejected(tmp_path) == [("g002", "train-1.tar", "is in train-0.tar already")]
    assert verify(tmp_path).faults == []
    (tmp_path / MANIFEST).unlink()
    write(tmp_path / "train-1.tar", {"g001": {"jpg": jpeg(9)}})
    assert index_shards(tmp_path).samples["train"] == 4
    assert verify(tmp_path).faults == []


def test_all_damaged_shards_are_named_and_nothing_is_written(foreign, tmp_path):
    first, second = foreign / "train" / "a-0000.tar", foreign / "galaxies-val-0.tar"
    with tarfile.open(first) as tar:
        damaged = tar.getmembers()[6]
    data = bytearray(first.read_bytes())
    data[damaged.offset + 3] ^= 0x04
    first.write_bytes(data)
    os.truncate(second, second.stat().st_size // 2)
    report = index_shards(foreign, output=tmp_path / "ours")
    assert report.damaged == [
        f"{first}: damaged tar header at byte {damaged.offset}",
        next(line for line in report.damaged if line.startswith(f"{second}: cut off")),
    ]
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda f: shutil.rmtree(f), "--index .*: is no folder"),
        (
            lambda f: [p.rename(p.with_suffix(".tar.gz")) for p in f.rglob("*.tar")],
            "5 such.*unpack",
        ),
        (lambda f: [p.unlink() for p in f.rglob("*.tar")], "no \\*.tar in it or below"),
        (lambda f: (f / MANIFEST).write_text("{}"), "exists already; remove it"),
        (
            lambda f: (
                [write(p, {"k": {"jpg": b"no"}}) for p in f.rglob("*-0.tar")]
                and [write(p, {}) for p in f.rglob("a-*.tar")]
            ),
            "none of 2 samples is usable; the first, k in galaxies-",
        ),
        (lambda f: [write(p, {}) for p in f.rglob("*.tar")], "no samples in it, nor in any other"),
    ],
    ids=["no folder", "compressed", "no shards", "listed", "unusable", "empty"],
)
def test_what_is_no_set_of_shards_is_refused_and_nothing_is_written(foreign, prepare, message):
    prepare(foreign)
    with pytest.raises(UserError, match=message) as error:
        index_shards(foreign)
    assert "\n" not in str(error.value)
    assert not list(foreign.rglob("*.npy")) and not list(foreign.rglob(".index-*"))


def test_an_output_that_cannot_be_written_is_refused_first(foreign, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x: cannot be written"):
        index_shards(foreign, output=tmp_path / "file" / "x")


def test_compressed_shards_among_others_are_counted(foreign):
    (foreign / "train" / "b.tar.gz").touch()
    assert index_shards(foreign).compressed == 1


def test_a_run_trains_from_listed_shards(tmp_path, launch):
    """The command line, then training: another member's name, keys with folders."""
    root, ours = tmp_path / "theirs", tmp_path / "ours"
    for split, numbers in (("train", range(12)), ("val", range(12, 18))):
        samples = {f"field{i % 3}/g{i}": {"image.jpg": jpeg(i), "z.png": jpeg(0)} for i in numbers}
        write(root / split / "0.tar", samples)
    tool = REPOSITORY / "tools/verify_shards.py"
    command = [tool, "--index", root, "--output", ours, "--processes", "1"]
    ambiguous = launch(1, *command, launcher="python")
    assert ambiguous.returncode == 2
    assert "--member image.jpg or --member z.png" in ambiguous.stderr
    listed = launch(1, *command, "--member", "image.jpg", launcher="python")
    assert listed.returncode == 0 and listed.stdout == f"{ours}: 12 train, 6 val, 0 test\n"
    overrides = (*TINY, f"data.path={ours}", f"run.dir={tmp_path / 'run'}", "run.steps=2")
    run = launch(
        1, "-m", "astropt_ds.train", "--config", "1m", *overrides, "zero.stage=0", launcher="python"
    )
    assert run.returncode == 0, run.stderr[-3000:]
    os.truncate(root / "val" / "0.tar", 5000)
    (ours / MANIFEST).unlink()
    damaged = launch(1, *command, "--member", "image.jpg", launcher="python")
    assert damaged.returncode == 1
    assert f"{root / 'val' / '0.tar'}: cut off" in damaged.stdout
    assert "1 damaged shards, nothing is written: fetch them anew" in damaged.stdout
