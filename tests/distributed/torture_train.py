"""astropt_ds.train as it is, whose ranks note what they consume: ``torture_train.py NOTES ...``.

Each process has a file NOTES/RANK-RANKS-PID.jsonl, to which it appends every step that it has
consumed: its number, and the sample numbers of its micro-batches. The disk is a slow one, so that
there is time to end a process in every part of a save.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from astropt_ds import train
from astropt_ds.data.batch import Batch
from astropt_ds.data.loader import Galaxies
from astropt_ds.errors import run_cli
from astropt_ds.training.slurm import adopt_step

SYNC_S = 0.03


def main(argv: list[str]) -> None:
    adopt_step()
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    with (Path(argv[0]) / f"{rank}-{ranks}-{os.getpid()}.jsonl").open("w") as file:
        note_steps(file)
        slow_down_the_disk()
        train.main(argv[1:])


def note_steps(file: IO[str]) -> None:
    steps = Galaxies.steps

    def noted(galaxies: Galaxies, start: int, stop: int) -> Iterator[Iterator[Batch]]:
        for step, batches in enumerate(steps(galaxies, start, stop), start):
            yield consumed(batches, step, file)

    Galaxies.steps = noted


def consumed(batches: Iterable[Batch], step: int, file: IO[str]) -> Iterator[Batch]:
    rows = []
    for batch in batches:
        rows.append(batch.rows.tolist())
        yield batch
    print(json.dumps({"step": step, "rows": rows}), file=file, flush=True)


def slow_down_the_disk() -> None:
    sync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(SYNC_S)
        sync(descriptor)

    os.fsync = slow


if __name__ == "__main__":
    run_cli(main)
