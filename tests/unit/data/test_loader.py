from collections import Counter

import numpy as np
import pytest
import torch

from astropt_ds.data.decode import decode
from astropt_ds.data.reader import dihedral
from astropt_ds.data.split import Split
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError
from astropt_ds.tokens import grid
from tests.unit.data.loading import galaxies, global_batches, kept, steps


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


def test_stamps_smaller_than_declared_are_told_before_the_run_or_refused(tiny):
    with pytest.raises(UserError) as error:
        galaxies(tiny, data__image_size=80)
    assert "smaller than data.image_size=80" in str(error.value)
    assert "115 of 115 images in split 'train'" in str(error.value)
    assert "all have at least 64 pixels" in str(error.value)
    warnings = galaxies(tiny, data__image_size=80, data__max_bad_fraction=1).warnings
    assert ["weight zero" in w for w in warnings] == [True, True]
    assert "'train'" in warnings[0] and "'val'" in warnings[1]
    assert galaxies(tiny).warnings == []


def test_data_of_other_channels_and_an_unnamed_path_are_refused(tiny):
    with pytest.raises(UserError, match="3 channels .R, G, B.; model.modalities.images.channels=4"):
        galaxies(tiny, model__modalities__images__channels=4)
    with pytest.raises(UserError, match="data.path is missing"):
        galaxies(tiny, data__path="")
