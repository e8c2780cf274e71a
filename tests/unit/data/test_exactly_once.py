"""Every galaxy exactly once an epoch, in the same global batches, however a run is cut and spread.

Real shards, real reading processes, real resumes: only the training is left out.
"""

import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from astropt_ds.config_source import load_config
from astropt_ds.data.decode import encode_fluxes
from astropt_ds.data.loader import Galaxies
from astropt_ds.data.manifest import FORMAT, Manifest
from astropt_ds.data.shards import Sample, write_index, write_shard

SIDE = 16  # pixels; one token


def write_survey(folder: Path, sizes: list[int]) -> None:
    """Shards of these sizes whose pixels are the number of the sample."""
    shards, number = [], 0
    for i, size in enumerate(sizes):
        samples = [
            Sample(f"g{n}", "npy", encode_fluxes(np.full((SIDE, SIDE, 1), n)), {}, SIDE, SIDE)
            for n in range(number, number + size)
        ]
        shards.append(write_shard(folder / f"train-{i:06d}.tar", samples))
        number += size
    blank = Sample("v", "npy", encode_fluxes(np.zeros((SIDE, SIDE, 1))), {}, SIDE, SIDE)
    Manifest(
        format=FORMAT,
        dtype="float32",
        channels=1,
        bands=["r"],
        nan="none",
        splits={
            "train": write_index(folder, "train", shards),
            "val": write_index(folder, "val", [write_shard(folder / "val-000000.tar", [blank])]),
        },
    ).save(folder)


def consumed(config, ranks, start, stop):
    """The sample numbers, read from the pixels, that each rank's micro-batches of a step hold."""
    loaders = [Galaxies(config) for _ in range(ranks)]
    steps = [[] for _ in range(start, stop)]
    for rank, loader in enumerate(loaders):
        loader.open(rank, ranks)
        for step, batches in zip(steps, loader.steps(start, stop), strict=True):
            for batch in batches:
                assert (batch.weights == 1).all() and not batch.faults
                pixels = batch.patches.numpy().astype(int)
                assert (pixels == batch.rows.numpy()[:, None, None]).all()
                step += pixels[:, 0, 0].tolist()
        loader.close()
    return steps


shard_sizes = st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(sum)
# (ranks, workers, steps) of a run and of each of its resumes
courses = st.lists(
    st.tuples(st.integers(1, 7), st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=3
)


@settings(max_examples=30)
@given(shard_sizes, courses, st.integers(1, 3), st.integers(0, 2**40), st.integers(1, 4))
def test_any_course_of_a_run_consumes_what_an_uninterrupted_one_does(
    sizes, course, multiple, seed, window
):
    total = math.lcm(*(ranks for ranks, _, _ in course)) * multiple
    with tempfile.TemporaryDirectory() as folder:
        write_survey(Path(folder), sizes)

        def configuration(workers):
            overrides = (
                *(f"data.path={folder}", f"data.image_size={SIDE}", f"data.workers={workers}"),
                *("model.modalities.images.channels=1", f"batch.global_images={total}"),
                *(f"seed={seed}", f"data.window={window}"),
            )
            return load_config("1m", list(overrides))

        steps = sum(steps for _, _, steps in course)
        n = sum(sizes)
        epochs = -(-n // total) + 1  # batches that hold an epoch at least
        uninterrupted = consumed(configuration(0), 1, 0, max(steps, epochs))
        start, cut = 0, []
        for ranks, workers, length in course:
            cut += consumed(configuration(workers), ranks, start, start + length)
            start += length
    for step, (expected, found) in enumerate(zip(uninterrupted, cut, strict=False)):
        assert Counter(found) == Counter(expected), f"global batch {step}"
    flat = [number for step in uninterrupted for number in step]
    for epoch in range(len(flat) // n):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
