"""Several surveys in one run, and surveys of fluxes."""

import numpy as np
import pytest
import torch

from astropt_ds.data.decode import decode
from astropt_ds.data.split import Split
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError
from astropt_ds.tokens import grid
from tests.unit.data.loading import galaxies, global_batches, kept, steps, write_fluxes


def mixed(shards, second, weights=(3, 1)):
    paths = zip("ab", (shards, second), weights, strict=True)
    return {
        key: value
        for name, path, weight in paths
        for key, value in (
            (f"data__sources__{name}__path", path),
            (f"data__sources__{name}__weight", weight),
        )
    }


def without_path(tiny):
    return tuple(override for override in tiny if not override.startswith("data.path"))


def test_several_sources_are_mixed_by_weight_the_same_for_any_ranks(tiny, shards, second):
    sources = mixed(shards, second)
    tiny = without_path(tiny)
    reference = global_batches(tiny, 1, 0, 30, **sources)
    other = global_batches(tiny, 3, 0, 30, **sources, data__workers=1)
    for (rows, patches), (other_rows, other_patches) in zip(reference, other, strict=True):
        assert torch.equal(rows, other_rows) and torch.equal(patches, other_patches)
    n = len(Split(Folder(shards), "train"))
    from_first = sum(int((rows < n).sum()) for rows, _ in reference) / 360
    loader = galaxies(tiny, **sources)
    assert loader.drawn(360) == {"a": from_first, "b": pytest.approx(1 - from_first)}
    assert abs(from_first - 0.75) < 0.05
    assert galaxies((*tiny, f"data.path={shards}")).drawn(360) == {}


def test_a_row_of_a_mixture_is_the_image_of_its_source(tiny, shards, second):
    loader = galaxies(without_path(tiny), **mixed(shards, second, (1, 1)))
    first, other = Split(Folder(shards), "train"), Split(Folder(second), "train")
    g = grid(64, 16, "rows")
    ((batch,),) = steps(loader, 0, 1)
    assert {row < len(first) for row in batch.rows.tolist()} == {True, False}
    for row, patches in zip(batch.rows.tolist(), batch.patches, strict=True):
        split, row = (first, row) if row < len(first) else (other, row - len(first))
        entry = split.index[row]
        path = split.store.shard(split.entry.shards[split.shard_of(row)])
        data = path.read_bytes()[entry["offset"] :][: entry["size"]]
        assert (g.to_patches(decode(data)) == patches.numpy()).all()


def test_the_validation_set_of_a_mixture_holds_each_source_by_its_weight(tiny, shards, second):
    loader = galaxies(without_path(tiny), **mixed(shards, second), eval__images=8)
    assert loader.validation_images == 8
    rows = loader._validation
    n = len(Split(Folder(shards), "val"))
    assert [(row < n) for row in rows.tolist()] == [True] * 6 + [False] * 2
    batches = kept(loader.validation())
    assert sum(float(batch.weights.sum()) for batch in batches) == 8


def test_a_change_of_weights_or_of_a_source_changes_the_hash(tiny, shards, second):
    tiny = without_path(tiny)
    hashes = [
        galaxies(tiny, **mixed(shards, second, weights)).hash
        for weights in [(3, 1), (3, 1), (1, 1)]
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_sources_beside_a_path_and_kinds_that_do_not_mix_are_refused(
    tiny, shards, second, tmp_path
):
    with pytest.raises(UserError, match="path and sources are both given"):
        galaxies(tiny, **mixed(shards, second))
    fluxes = write_fluxes(tmp_path / "fluxes", 3, [np.zeros((64, 64, 3))] * 12)
    with pytest.raises(UserError, match="pixels of several kinds cannot be mixed"):
        galaxies(without_path(tiny), **mixed(shards, fluxes))


@pytest.mark.parametrize("nan", ["none", "zero"])
def test_fluxes_reach_the_batch_as_they_are_and_nan_by_the_manifests_rule(tiny, tmp_path, nan):
    rng = np.random.default_rng(0)
    images = rng.normal(0, 1e-3, (12, 48, 64, 4)).astype(np.float32)
    images[3, 10, 20, 1] = np.nan
    images[4, 40, 50, 0] = np.inf
    folder = write_fluxes(tmp_path / "fluxes", 4, images, nan)
    loader = galaxies(
        (*tiny, f"data.path={folder}"),
        model__modalities__images__channels=4,
        data__image_size=48,
        data__workers=1,
    )
    g = grid(48, 16, "rows")
    ((batch,),) = steps(loader, 0, 1)
    assert batch.patches.dtype == torch.float32
    for row, weight, patches in zip(batch.rows.tolist(), batch.weights, batch.patches, strict=True):
        bad = row in (3, 4)
        assert weight == (0.0 if bad and nan == "none" else 1.0)
        if weight:
            image = np.where(np.isfinite(images[row]), images[row], 0)
            assert (g.to_patches(image[:, 8:56]) == patches.numpy()).all()
    reasons = {fault.key: fault.reason for fault in batch.faults}
    expected = {"g3", "g4"} if nan == "none" else set()
    assert set(reasons) == expected
    assert all(reason == "holds pixels that are not finite" for reason in reasons.values())
