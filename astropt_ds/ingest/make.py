"""A survey, into shards.

Every image is decoded once on its way in. What cannot be used is left out, counted, and listed
with its reason in ``rejected.csv`` beside the shards.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from astropt_ds.data.manifest import FORMAT, SPLITS, Manifest
from astropt_ds.data.parallel import parallel
from astropt_ds.data.rejected import write_rejected
from astropt_ds.data.shards import write_index
from astropt_ds.errors import UserError
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.plan import Plan, make_plan
from astropt_ds.ingest.unfinished import finish, is_finished, load_record, unfinished
from astropt_ds.ingest.write import Writer


@dataclass(frozen=True)
class Report:
    """How many images went where.

    Attributes:
        samples: in each split.
        rejected: left out.
        splits: how they were made.
    """

    samples: dict[str, int]
    rejected: int
    splits: str


def make_shards(job: Job, say: Callable[[str], None] = print) -> Report:
    """Write a data set; it appears whole, or not at all. What is interrupted goes on next time.

    Args:
        job: what of, and where to.
        say: takes what a user should know on the way, a line each.

    Raises:
        UserError: the input is not there or not usable, or the output exists, cannot be written
            or is in the making elsewhere.
    """
    job.check()
    plan = make_plan(job)
    for note in plan.survey.notes:
        say(note)
    try:
        with unfinished(job, plan) as folder:
            _write_shards(job, plan, folder, say)
            report = _complete(job, plan, folder)
            finish(folder, job.output)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output {job.output}: cannot be written ({reason})") from None
    return report


def _write_shards(job: Job, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
    catalogue, source = plan.survey.catalogue, plan.survey.source
    writer = Writer(
        source=source,
        facts=plan.facts,
        stretch=plan.stretch,
        id_column=catalogue.id_column if catalogue else "id",
        keep_nan=job.nan == "zero",
        min_side=job.min_side,
        folder=folder,
    )
    sizes, done = {}, set()
    for name, rows in plan.shards(job.samples_per_shard):
        sizes[name] = len(rows)
        if is_finished(folder, name, source, rows):
            done.add(name)
    if done:
        say(f"goes on from {len(done)} finished shards of {len(sizes)}")
    images = sum(sizes[name] for name in done)
    parts = plan.parts(job.samples_per_shard, job.columns, done)
    processes = min(job.processes, max(1, len(sizes) - len(done)))
    with (
        tqdm(
            initial=images, total=len(plan.rows), unit="image", disable=None, desc="shards"
        ) as progress,
        closing(parallel(writer.write, parts, processes)) as written,
    ):
        for count in written:
            progress.update(count)


def _complete(job: Job, plan: Plan, folder: Path) -> Report:
    """Write what lies beside the shards."""
    rejected = list(plan.rejected)
    entries = {}
    for split in SPLITS:
        shards = []
        for name, _ in plan.shards(job.samples_per_shard):
            if name.rpartition("-")[0] == split:
                shard, left_out = load_record(folder, name)
                shards.append(shard)
                rejected += left_out
        entries[split] = write_index(folder, split, shards)
    if not any(entry.samples for entry in entries.values()):
        shutil.rmtree(folder)
        _, file, reason = rejected[0]
        raise UserError(
            f"{job.where}: none of {len(rejected)} is usable; the first, {file}: {reason}"
        )
    Manifest(format=FORMAT, splits=entries, **_pixels(job, plan)).save(folder)
    if rejected:
        write_rejected(folder, rejected)
    samples = {name: entry.samples for name, entry in entries.items()}
    return Report(samples, len(rejected), plan.how)


def _pixels(job: Job, plan: Plan) -> dict[str, Any]:
    """What the manifest says of pixels."""
    facts = plan.facts
    if facts.dtype == "float32" and not plan.stretch:
        nan, bands = "zero" if job.nan == "zero" else "none", list(facts.bands)
        return {"dtype": "float32", "channels": len(bands), "bands": bands, "nan": nan}
    stretch = None
    if plan.stretch:
        stretch = {**asdict(plan.stretch), "nan": job.nan}
        shown = {name: facts.bands[stretch[name]] for name in ("red", "green", "blue")}
        stretch |= {**shown, "scales": list(plan.stretch.scales)}
    bands = ["R", "G", "B"] if plan.stretch else list(facts.bands)
    return {"dtype": "uint8", "channels": 3, "bands": bands, "nan": "none", "stretch": stretch}
