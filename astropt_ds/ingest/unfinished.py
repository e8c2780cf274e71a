"""An output in the making: OUTPUT.partial, which an interrupted job goes on from.

Beside the shards there, ``records`` holds what is known of each finished one, written after it, and
what the whole is to become. The folder is renamed when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from astropt_ds.data.manifest import FORMAT, index_dtype
from astropt_ds.data.rejected import Rejected
from astropt_ds.data.shards import Shard
from astropt_ds.errors import UserError
from astropt_ds.files import write_durably
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.plan import SPLIT, Plan
from astropt_ds.ingest.source import FILE, ID, ROW, Source

RECORDS = "records"
JOB = "job.json"  # among the records: what the shards are made of


@contextmanager
def unfinished(job: Job, plan: Plan) -> Iterator[Path]:
    """The folder in which a job's output grows, ours alone as long as the context lasts.

    Raises:
        UserError: another command is at it, or it is what another job left.
    """
    folder = job.output.with_name(job.output.name + ".partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(job):
        if job.output.exists():  # since we looked first
            raise UserError(f"--output {job.output}: exists already; name a new folder")
        ours = _fingerprint(job, plan)
        if folder.exists():
            _refuse_others(folder, ours)
        else:
            (folder / RECORDS).mkdir(parents=True)
        _write(folder / RECORDS / JOB, ours)
        yield folder


def finish(folder: Path, output: Path) -> None:
    """Give a complete output its name."""
    folder.rename(output)
    shutil.rmtree(output / RECORDS)


def save_record(
    folder: Path, name: str, shard: Shard, rejected: list[Rejected], state: str
) -> None:
    """Note that a shard is finished, and all that the index and the report need of it.

    ``state`` is that of its images' files before they were read.
    """
    rows = [[row[0].decode(), *row[1:]] for row in shard.rows.tolist()]
    record = {
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "rows": rows,
        "rejected": rejected,
        "state": state,
    }
    _write(folder / RECORDS / f"{name}.json", record)


def load_record(folder: Path, name: str) -> tuple[Shard, list[Rejected]]:
    """A finished shard, and what was left out of it."""
    record = json.loads((folder / RECORDS / f"{name}.json").read_text())
    rows = [(key.encode(), *rest) for key, *rest in record["rows"]]
    dtype = index_dtype(max((len(row[0]) for row in rows), default=1))
    shard = Shard(f"{name}.tar", record["bytes"], record["sha256"], np.array(rows, dtype))
    return shard, [Rejected(*row) for row in record["rejected"]]


def is_finished(folder: Path, name: str, source: Source, rows: pd.DataFrame) -> bool:
    """Whether a shard need not be written again: both it and its record are there and whole, and
    its images' files are as they were."""
    try:
        record = json.loads((folder / RECORDS / f"{name}.json").read_text())
        whole = record["bytes"] == (folder / f"{name}.tar").stat().st_size
    except (OSError, ValueError):
        return False
    return whole and record["state"] == source.state(rows)


@contextmanager
def _lock(job: Job) -> Iterator[None]:
    path = job.output.with_name(job.output.name + ".lock")
    with path.open("w") as file:
        busy = UserError(f"--output {job.output}: another command is at it; wait for its end")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        if not os.fstat(file.fileno()).st_nlink:  # the other one ended just now
            raise busy
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _fingerprint(job: Job, plan: Plan) -> dict[str, Any]:
    """All that the bytes of the output depend on."""
    options = {k: v for k, v in asdict(job).items() if k not in ("output", "processes")}
    digest = hashlib.sha256()
    for name in (ID, FILE, ROW, SPLIT):
        if name in plan.rows:
            hashes = pd.util.hash_pandas_object(plan.rows[name], index=False)
            digest.update(hashes.to_numpy().tobytes())
    files = [*plan.survey.source.files()]
    if job.catalogue:
        below = job.catalogue.rglob("*") if job.catalogue.is_dir() else [job.catalogue]
        files += sorted(file for file in below if file.is_file())
    stats = [(str(file), *_size_and_time(file)) for file in files]
    return {
        "format": FORMAT,
        "options": json.loads(json.dumps(options, default=str)),
        "images": digest.hexdigest(),
        "files": hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
    }


def _size_and_time(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _refuse_others(folder: Path, ours: dict[str, Any]) -> None:
    """What lies in the folder was left by this job; raises UserError."""
    try:
        theirs = json.loads((folder / RECORDS / JOB).read_text())
        options = theirs["options"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{folder}: is in the way and was not left by this command; remove it"
        ) from None
    if theirs == ours:
        return
    differs = "the images or their tables are others now"
    for name, value in ours["options"].items():
        if options.get(name) != value:
            differs = f"--{name.replace('_', '-')} was {options.get(name)!r} there, not {value!r}"
            break
    raise UserError(f"{folder}: another job left it ({differs}); remove it to start anew")


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    write_durably(partial, json.dumps(content))
    os.replace(partial, path)
