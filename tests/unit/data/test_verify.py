import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from astropt_ds.data.decode import encode_fluxes
from astropt_ds.data.manifest import MANIFEST
from astropt_ds.data.shards import Sample, write_index, write_shard
from astropt_ds.data.verify import verify
from tests.unit.data.damage import SHARD, change, faults, flip, manifest_of, members, seal


def test_sound_shards_have_no_fault_and_are_read_once(data):
    report = verify(data, decode=True)
    manifest = manifest_of(data)
    size = sum(path.stat().st_size for path in data.glob("*.tar"))
    assert report.faults == []
    assert report.samples == report.listed == 150
    assert report.shards == sum(len(entry.shards) for entry in manifest.splits.values())
    assert report.splits == ("train", "val", "test")
    again = 4 * 512 * report.samples + 2 * tarfile.RECORDSIZE * report.shards
    assert size <= report.bytes_read <= size + again  # headers and the archive's end


def test_a_missing_shard_is_named(data):
    (data / SHARD).unlink()
    assert faults(data) == [(SHARD, None, "missing; the manifest lists it")]


def test_a_shard_that_the_manifest_does_not_list_is_named(data):
    shutil.copy(data / SHARD, data / "train-000099.tar")
    assert faults(data) == [("train-000099.tar", None, "is not in the manifest")]


def test_a_flipped_byte_is_told_by_its_key(data):
    image = members(data)[6]
    flip(data / SHARD, image.offset_data + image.size // 2)
    key = image.name.partition(".")[0]
    assert faults(data) == [
        (SHARD, key, "its bytes do not match their crc32 in the index"),
        (SHARD, None, "its sha256 is not the manifest's; 1 of 20 images differ"),
    ]


def test_damage_in_labels_is_told_from_damage_in_images(data):
    labels = members(data)[7]
    assert labels.name.endswith(".json")
    flip(data / SHARD, labels.offset_data + 3)
    where = "all images match their crc32: the damage lies in labels or headers"
    assert faults(data) == [(SHARD, None, f"its sha256 is not the manifest's; {where}")]


@pytest.mark.parametrize("number", [0, 12, 39])  # an image's header, and the last labels' one
@pytest.mark.parametrize("fraction", [1, 0.999])
def test_a_damaged_header_is_told_where_tar_readers_stop_in_silence(data, number, fraction):
    all_members = members(data)
    member = all_members[number]
    flip(data / SHARD, member.offset + 5)
    if number:  # this is why: no error, and the rest is lost
        assert len(members(data)) == number
    key, _, suffix = member.name.partition(".")
    found = faults(data, fraction=fraction)
    stop = f"damaged tar header at byte {member.offset}"
    if number == 0:
        stop = "no tar header (bad checksum) at byte 0"
    after = f", after the image of {key}" if suffix == "json" else ""
    expected = (SHARD, None if after else key, f"{stop}{after}: plain tar readers stop there")
    assert found[0] == expected
    assert all("sha256" in reason for _, _, reason in found[1:])
    assert len(found) == (2 if fraction == 1 else 1)


def test_a_header_of_zeros_is_no_end_of_the_archive(data):
    member = members(data)[10]
    change(data / SHARD, member.offset, bytes(512))
    key = member.name.partition(".")[0]
    stop = f"zeros in place of a tar header at byte {member.offset}: plain tar readers stop there"
    assert faults(data)[0] == (SHARD, key, stop)


def test_several_damaged_headers_are_all_told(data):
    hit = [members(data)[number] for number in (4, 20, 32)]
    for member in hit:
        flip(data / SHARD, member.offset + 5)
    keys = [key for _, key, reason in faults(data) if "damaged tar header" in reason]
    assert keys == [member.name.partition(".")[0] for member in hit]


def test_a_header_that_names_another_sample_is_told(data):
    member = members(data)[8]
    key = member.name.partition(".")[0]
    member.name = "stranger.jpg"
    change(data / SHARD, member.offset, member.tobuf(tarfile.GNU_FORMAT))
    reason = f"its tar header says stranger, {member.size} bytes; not {member.size}"
    assert (SHARD, key, reason) in faults(data)


@pytest.mark.parametrize(
    "cut, expected",
    [
        (lambda m: m[12].offset_data + 100, "truncated: 14 of 20 samples are lost, from {12} on"),
        (lambda m: m[12].offset, "truncated: 14 of 20 samples are lost, from {12} on"),
        (lambda m: m[39].offset_data + 5, "cut off or damaged (unexpected end of data) at byte"),
        (lambda m: m[39].offset_data + 512, "cut off at byte"),
        (lambda m: m[39].offset_data + 1024, "cut off at byte"),
        (lambda m: 0, "truncated: 20 of 20 samples are lost, from {0} on"),
    ],
    ids=["in an image", "between samples", "in labels", "no end", "half an end", "empty"],
)
@pytest.mark.parametrize("fraction", [1, 0.1])
def test_a_truncated_shard_is_told_with_what_is_lost(data, cut, expected, fraction):
    found = members(data)
    keys = {f"{{{i}}}": member.name.partition(".")[0] for i, member in enumerate(found)}
    for placeholder, key in keys.items():
        expected = expected.replace(placeholder, key)
    size = (data / SHARD).stat().st_size
    os.truncate(data / SHARD, cut(found))
    first, second = faults(data, fraction=fraction)
    assert first == (SHARD, None, f"{cut(found)} bytes; the manifest says {size}")
    assert second[:2] == (SHARD, None) and second[2].startswith(expected)


def test_surplus_bytes_are_told(data):
    size = (data / SHARD).stat().st_size
    with (data / SHARD).open("ab") as file:
        file.write(bytes(512))
    assert faults(data) == [(SHARD, None, f"{size + 512} bytes; the manifest says {size}")]


def test_a_missing_index_is_told_and_the_shards_are_still_checked(data):
    (data / "train.index.npy").unlink()
    flip(data / SHARD, members(data)[6].offset_data)
    assert faults(data) == [
        ("train.index.npy", None, "missing; the manifest lists it"),
        (SHARD, None, "its sha256 is not the manifest's; which samples, only a sound index tells"),
    ]


def test_a_damaged_index_is_told_with_the_shards_it_fails_for(data):
    path = data / "train.index.npy"
    flip(path, path.stat().st_size - 1)
    last = manifest_of(data).splits["train"].shards[-1].name
    assert faults(data) == [
        (path.name, None, "its sha256 is not the manifest's"),
        (path.name, None, f"the rows of {last} do not match their checksum in manifest.json"),
    ]


def test_an_index_of_another_size_or_kind_is_told(data):
    path = data / "train.index.npy"
    size = path.stat().st_size
    rows = np.load(path)
    np.save(path, rows[:-1])
    assert faults(data) == [
        (path.name, None, f"{path.stat().st_size} bytes; the manifest says {size}"),
        (path.name, None, f"{len(rows) - 1} rows; the manifest's shards have {len(rows)} samples"),
    ]
    np.save(path, np.zeros(len(rows)))
    assert "not an index: its columns are None" in faults(data)[1][2]
    path.write_bytes(b"\x93NUMPY nonsense")
    assert "not a readable index" in faults(data)[1][2]


def test_counts_that_disagree_are_told(data):
    manifest = json.loads((data / MANIFEST).read_text())
    manifest["splits"]["train"]["samples"] += 1
    (data / MANIFEST).write_text(json.dumps(manifest))
    total = manifest["splits"]["train"]["samples"]
    reason = f"split 'train' has {total} samples; its shards add up to {total - 1}"
    assert faults(data) == [(MANIFEST, None, reason)]


def test_an_image_that_is_there_twice_is_told_and_one_key_for_two_images_is_not(data):
    images = (b"same", b"same", b"other")
    samples = [Sample("twice", "jpg", image, {}, 8, 8) for image in images]
    more = [write_shard(data / f"val-9{i}.tar", [samples[i]]) for i in range(3)]
    manifest = manifest_of(data)
    for entry in manifest.splits["val"].shards:
        (data / entry.name).unlink()
    splits = {**manifest.splits, "val": write_index(data, "val", more)}
    manifest.model_copy(update={"splits": splits}).save(data)
    assert faults(data) == [
        ("val.index.npy", "twice", "is in split 'val' 2 times with the same bytes")
    ]


def test_a_sample_without_labels_is_told_where_others_have_some(data):
    """Renamed, so that the tar file itself is sound."""
    labels = members(data)[7]
    key = labels.name.partition(".")[0]
    labels.name = f"{key}.text"
    change(data / SHARD, labels.offset, labels.tobuf(tarfile.GNU_FORMAT))
    seal(data)
    for fraction in (1, 0.999):
        assert faults(data, fraction=fraction) == [(SHARD, key, "has no .json")]


def test_images_that_are_not_as_declared_are_told_when_decoded(data):
    image = members(data)[6]
    key = image.name.partition(".")[0]
    change(data / SHARD, image.offset_data, b"no image at all")
    seal(data)
    assert faults(data) == []
    reason = "cannot be decoded (no image format that Pillow knows)"
    assert faults(data, decode=True) == [(SHARD, key, reason)]
    assert faults(data, decode=True, split="val") == []


def test_another_size_dtype_or_channel_count_is_told_when_decoded(data):
    image = members(data)[6]
    key = image.name.partition(".")[0]
    fluxes = encode_fluxes(np.zeros((4, 8, 1), np.float32))
    change(data / SHARD, image.offset_data, fluxes)
    seal(data)
    assert image.size > len(fluxes)
    declared = "declared is 64 x 64 pixels of 3 channels, uint8"
    reason = f"is 8 x 4 pixels of 1 channels, float32; {declared}"
    assert faults(data, decode=True) == [(SHARD, key, reason)]


def test_an_image_of_training_among_those_that_measure_is_told(data):
    image = Sample("both", "jpg", b"same", {}, 8, 8)
    manifest = manifest_of(data)
    splits = dict(manifest.splits)
    for split in ("train", "val"):
        for shard in splits[split].shards:
            (data / shard.name).unlink()
        splits[split] = write_index(data, split, [write_shard(data / f"{split}-0.tar", [image])])
    manifest.model_copy(update={"splits": splits}).save(data)
    expected = ("val.index.npy", "both", "is in split 'train', too, with the same bytes")
    assert faults(data) == [expected]


def test_a_manifest_that_is_wrong_about_its_images_is_told(data):
    manifest = json.loads((data / MANIFEST).read_text())
    manifest["bands"].append("u")
    first = manifest["splits"]["train"]["shards"][0]
    first["smallest"] = 512
    (data / MANIFEST).write_text(json.dumps(manifest))
    assert [reason for _, _, reason in faults(data)] == [
        "names 4 bands for 3 channels",
        f"{first['name']}: smallest is 512; the index says 64 pixels",
    ]
