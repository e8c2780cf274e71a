"""What a table will take, before any of it is made."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from contextlib import closing

import torch

from astropt_ds.embedding.job import EmbedJob
from astropt_ds.embedding.prepare import Prepared, make_embedder, open_reader, prepare

TRIAL_S = 10.0  # that galaxies are embedded on trial, about
BYTES = {"float32": 4, "float16": 2}


def estimate(job: EmbedJob) -> Iterator[str]:
    """Say in lines how many galaxies, bytes and hours a job takes; nothing is written.

    Raises:
        UserError: as :func:`~astropt_ds.embedding.run.embed` does.
    """
    ready = prepare(job)
    plan, recipe = ready.plan, ready.recipe
    yield (
        f"{plan.rows:,} galaxies of {ready.galaxies.what}, {plan.parts:,} parts; their central "
        f"{ready.view.whole.side} pixels"
    )
    yield from ready.notes
    if ready.galaxies.missing:
        yield f"{len(ready.galaxies.missing):,} of the ids asked for are not in it"
    share = plan.rows / ready.galaxies.rows
    read, written = share * ready.galaxies.size, plan.rows * recipe.values * BYTES[job.dtype]
    yield f"{read / 1e9:,.3g} GB to read, {written / 1e9:,.3g} GB of embeddings to write"
    yield from _trial(job, ready)


def _trial(job: EmbedJob, ready: Prepared) -> Iterator[str]:
    """How long it takes, by some seconds of it."""
    plan = ready.plan
    with closing(open_reader(ready)) as reader:
        embedder = make_embedder(job, ready)
        start, done = 0.0, 0
        for chunk in reader.read([(0, 0, plan.rows)]):
            embedded = embedder.embed_patches(torch.from_numpy(chunk.patches), ready.recipe)
            for embedding in embedded.values():
                embedding.cpu()  # when it is there, it is done
            if not start:  # the first also started processes and warmed caches
                start = time.monotonic()
                continue
            done += len(chunk.patches)
            if time.monotonic() - start > TRIAL_S:
                break
        taken = time.monotonic() - start
    if not done:
        yield "too few for an estimate of the time: less than a minute"
        return
    rate = done / taken
    left = datetime.timedelta(seconds=round(plan.rows / rate))
    yield f"{rate:,.1f} galaxies/s on {ready.device} in {ready.precision}: {left} for one task"
