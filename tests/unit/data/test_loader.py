import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from astropt_ds.config_source import load_config
from astropt_ds.data.batch import Batch
from astropt_ds.data.decode import decode
from astropt_ds.data.loader import Galaxies
from astropt_ds.data.reader import dihedral
from astropt_ds.data.split import Split
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError
from astropt_ds.tokens import grid


def galaxies(tiny, rank=0, ranks=1, **overrides):
    changes = [f"{k.replace('__', '.')}={v}" for k, v in overrides.items()]
    found = Galaxies(load_config("1m", [*tiny, *changes]))
    found.open(rank, ranks)
    return found


def kept(batches):
    """Copies of batches, whose memory is reused."""
    return [
        Batch(b.patches.clone(), b.weights.clone(), b.rows.clone(), b.faults, b.problem)
        for b in batches
    ]


def steps(loader, start, stop):
    """The micro-batches of each step, as copies."""
    return [kept(batches) for batches in loader.steps(start, stop)]


def global_batches(tiny, ranks, start, stop, **overrides):
    """The rows and patches of each global batch, gathered from all ranks and sorted."""
    gathered = [[] for _ in range(start, stop)]
    # all before any reads: as in a run, workers start while their process has no threads
    for loader in [galaxies(tiny, rank, ranks, **overrides) for rank in range(ranks)]:
        for i, batches in enumerate(steps(loader, start, stop)):
            gathered[i] += batches
        loader.close()
    merged = []
    for batches in gathered:
        rows = torch.cat([b.rows for b in batches])
        patches = torch.cat([b.patches for b in batches])
        order = torch.argsort(rows * 10**6 + patches.long().sum((1, 2)) % 10**6, stable=True)
        merged.append((rows[order], patches[order]))
    return merged


@pytest.mark.parametrize(
    "ranks, workers, micro", [(1, 0, 12), (2, 0, 2), (3, 2, 4), (4, 1, 1), (6, 0, 2), (12, 0, 1)]
)
def test_a_global_batch_is_the_same_for_any_ranks_workers_and_accumulation(
    tiny, ranks, workers, micro
):
    reference = global_batches(tiny, 1, 0, 12)
    other = global_batches(tiny, ranks, 0, 12, data__workers=workers, batch__micro=micro)
    for (rows, patches), (other_rows, other_patches) in zip(reference, other, strict=True):
        assert torch.equal(rows, other_rows)
        assert torch.equal(patches, other_patches)


def test_epochs_are_exactly_once_across_batches_that_straddle_them(tiny, shards):
    n = len(Split(Folder(shards), "train"))
    assert n % 12  # or nothing straddles
    rows = torch.cat([rows for rows, _ in global_batches(tiny, 2, 0, 3 * n // 12)]).tolist()
    counts = Counter(rows)
    assert len(counts) == n and set(counts.values()) <= {2, 3, 4}
    loader = galaxies(tiny)
    flat = torch.cat([b.rows for batches in steps(loader, 0, 3 * n // 12) for b in batches])
    for epoch in range(2):
        assert sorted(flat[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_starting_at_a_step_gives_what_reading_up_to_it_would_have(tiny):
    whole = global_batches(tiny, 2, 0, 9, data__augment="dihedral")
    resumed = global_batches(tiny, 3, 5, 9, data__augment="dihedral")
    for (rows, patches), (other_rows, other_patches) in zip(whole[5:], resumed, strict=True):
        assert torch.equal(rows, other_rows)
        assert torch.equal(patches, other_patches)


@pytest.mark.parametrize("orientation", ["rows", "columns"])
def test_a_slot_holds_the_centre_of_its_own_image(tiny, shards, orientation):
    loaded = galaxies(tiny, data__image_size=48, model__orientation=orientation)
    ((batch,),) = steps(loaded, 0, 1)
    split, g = Split(Folder(shards), "train"), grid(48, 16, orientation)
    for row, patches in zip(batch.rows.tolist(), batch.patches, strict=True):
        shard, _ = split.place(row)
        entry = split.index[row]
        data = (shards / shard).read_bytes()[entry["offset"] :][: entry["size"]]
        assert (g.to_patches(decode(data)[8:56, 8:56]) == patches.numpy()).all()
    assert batch.weights.tolist() == [1.0] * 12


def test_dihedral_augmentation_is_one_of_eight_symmetries_drawn_anew_each_epoch(tiny, shards):
    plain = global_batches(tiny, 1, 0, 1)[0]
    n = len(Split(Folder(shards), "train"))
    seen = {}
    flipped = galaxies(tiny, data__augment="dihedral")
    for batches in steps(flipped, 0, 4 * n // 12):
        for row, patches in zip(batches[0].rows.tolist(), batches[0].patches, strict=True):
            seen.setdefault(row, []).append(patches)
    g = grid(64, 16, "rows")
    chosen = set()
    for row, patches in zip(plain[0].tolist(), plain[1], strict=True):
        image = g.to_images(patches[None])[0].numpy()
        versions = [g.to_patches(dihedral(image, e)) for e in range(8)]
        for version in seen[row]:
            matches = [e for e in range(8) if (versions[e] == version.numpy()).all()]
            assert len(matches) == 1
            chosen.add(matches[0])
    assert chosen == set(range(8))


def test_the_eight_symmetries_are_distinct_and_form_the_group():
    image = np.arange(9).reshape(3, 3, 1)
    images = {dihedral(image, e).tobytes() for e in range(8)}
    assert len(images) == 8
    for a in range(8):
        for b in range(8):
            assert dihedral(dihedral(image, a), b).tobytes() in images


@pytest.mark.parametrize("ranks, micro", [(1, 1), (2, 3), (3, 4), (4, 3)])
def test_validation_reads_its_set_once_in_equal_numbers_of_passes(tiny, shards, ranks, micro):
    n = len(Split(Folder(shards), "val"))
    for images in (5, n, 1000):
        shares = [
            kept(galaxies(tiny, r, ranks, batch__micro=micro, eval__images=images).validation())
            for r in range(ranks)
        ]
        assert len({len(share) for share in shares}) == 1
        batches = [batch for share in shares for batch in share]
        rows = torch.cat([b.rows[b.weights > 0] for b in batches])
        assert sorted(rows.tolist()) == list(range(min(n, images)))
        padding = torch.cat([b.weights[b.rows < 0] for b in batches])
        assert (padding == 0).all()
        assert not any(batch.faults for batch in batches)


def damage(shards, tmp_path, row, how):
    """A copy of the shards with one training image changed in place."""
    copy = tmp_path / "damaged"
    shutil.copytree(shards, copy)
    split = Split(Folder(copy), "train")
    shard, key = split.place(row)
    entry = split.index[row]
    data = bytearray((copy / shard).read_bytes())
    offset, size = int(entry["offset"]), int(entry["size"])
    if how == "flipped bytes":
        for i in range(offset + size // 2, offset + size // 2 + 4):
            data[i] ^= 0xFF
        (copy / shard).write_bytes(data)
    else:  # undecodable although the checksum agrees: it was so when it was indexed
        import zlib

        data[offset : offset + size] = bytes(size)
        (copy / shard).write_bytes(data)
        index = np.load(copy / "train.index.npy")
        index[row]["crc32"] = zlib.crc32(bytes(size))
        np.save(copy / "train.index.npy", index)
        manifest, number = Folder(copy).manifest, split.shard_of(row)
        rows = index[split.first[number] : split.first[number + 1]]
        manifest.splits["train"].shards[number].index_crc32 = zlib.crc32(rows.tobytes())
        manifest.save(copy)
    return copy, shard, key


@pytest.mark.parametrize(
    "how, reason", [("flipped bytes", "checksum"), ("undecodable", "cannot be decoded")]
)
def test_a_bad_image_keeps_its_slot_with_weight_zero_and_is_named(
    tiny, shards, tmp_path, how, reason
):
    copy, shard, key = damage(shards, tmp_path, 3, how)
    bad = galaxies((*tiny, f"data.path={copy}"))
    n = len(Split(Folder(shards), "train"))
    good = galaxies(tiny)
    for (a,), (b,) in zip(steps(bad, 0, n // 12), steps(good, 0, n // 12), strict=True):
        assert torch.equal(a.rows, b.rows)
        hit = a.rows == 3
        assert torch.equal(a.weights, (~hit).float())
        assert torch.equal(a.patches[~hit], b.patches[~hit])
        assert (a.patches[hit] == 0).all()
        assert [(f.shard, f.key) for f in a.faults] == [(shard, key)] * int(hit.sum())
        assert all(reason in f.reason for f in a.faults)


def test_stamps_smaller_than_declared_are_told_before_the_run_or_refused(tiny):
    with pytest.raises(UserError) as error:
        galaxies(tiny, data__image_size=80)
    assert "smaller than data.image_size=80" in str(error.value)
    assert "115 of 115 images in split 'train'" in str(error.value)
    assert "all have 64 pixels" in str(error.value)
    warnings = galaxies(tiny, data__image_size=80, data__max_bad_fraction=1).warnings
    assert ["weight zero" in w for w in warnings] == [True, True]
    assert "'train'" in warnings[0] and "'val'" in warnings[1]
    assert galaxies(tiny).warnings == []


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda p: shutil.rmtree(p), "is no folder"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json, so no shards"),
        (lambda p: (p / "manifest.json").write_text("{}"), "not a manifest"),
        (lambda p: (p / "manifest.json").write_text("["), "not a manifest"),
        (lambda p: (p / "train-000001.tar").unlink(), "train-000001.tar: missing"),
        (lambda p: (p / "train-000001.tar").write_bytes(b"x"), "1 bytes; the manifest says"),
        (
            lambda p: (p / "train.index.npy").write_bytes(b"x"),
            "not the index that the manifest describes",
        ),
        (lambda p: np.save(p / "train.index.npy", np.zeros(3)), "not the index that"),
    ],
)
def test_damaged_data_sets_are_refused_at_the_start(tiny, shards, tmp_path, harm, message):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    harm(copy)
    with pytest.raises(UserError, match=message) as error:
        galaxies((*tiny, f"data.path={copy}"))
    assert "\n" not in str(error.value)


def test_data_of_other_channels_and_an_unnamed_path_are_refused(tiny):
    with pytest.raises(UserError, match="3 channels .R, G, B.; model.modalities.images.channels=4"):
        galaxies(tiny, model__modalities__images__channels=4)
    with pytest.raises(UserError, match="data.path is missing"):
        galaxies(tiny, data__path="")


def test_the_hash_changes_with_the_data(tiny, shards, tmp_path):
    copy, *_ = damage(shards, tmp_path, 0, "undecodable")
    assert galaxies((*tiny, f"data.path={copy}")).hash != galaxies(tiny).hash
