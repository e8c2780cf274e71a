"""The training command with something wrong on its last rank: ``disturbed_train.py WHAT ...``."""

import ctypes
import itertools
import os
import sys
import time
from pathlib import Path

from astropt_ds import train
from astropt_ds.data.reader import Reader
from astropt_ds.errors import run_cli
from astropt_ds.training import folder, staging, watchdog
from astropt_ds.training.engine import Engine


def stand_still():
    time.sleep(1000)


def hanging():
    """No step ends after the third."""
    watchdog.GRACE_S = 2.0
    step, last = Engine.step, os.environ.get("RANK") == str(int(os.environ["WORLD_SIZE"]) - 1)

    def hang(engine, *arguments, **options):
        if engine.updates == 3 and last:
            stand_still()
        return step(engine, *arguments, **options)

    Engine.step = hang


def holding_the_lock():
    """The same in C code that never lets another thread of Python run."""
    global stand_still
    watchdog.GRACE_S = 0.5
    stand_still = lambda: ctypes.PyDLL(None).sleep(1000)  # noqa: E731
    hanging()
    watchdog.GRACE_S = 0.5


def spoilt(until=10**6):
    """The loss is no number from the fourth step on."""
    step, calls = Engine.step, itertools.count(1)

    def spoil(engine, batches, **options):
        batches = list(batches)
        if 4 <= next(calls) < until:
            batches[0].weights[0] = float("nan")
        return step(engine, batches, **options)

    Engine.step = spoil


def spoilt_once():
    """At the fourth step alone."""
    spoilt(until=5)


def slow_data():
    """Every read takes long, which nobody else's does."""
    read = Reader.read

    def slow(reader, *arguments):
        time.sleep(0.1)
        return read(reader, *arguments)

    if os.environ["RANK"] != "0":
        Reader.read = slow


def elsewhere():
    """A relative path means another folder there, as a local disk of another node would."""
    folder.PATIENCE_S = 1.0
    if os.environ["RANK"] != "0":
        Path("elsewhere").mkdir(exist_ok=True)
        os.chdir("elsewhere")


def unwritable():
    """Its file of the checkpoint at step 6 cannot be written: there is a folder in its place."""
    save = staging.save_file

    def hindered(tensors, path):
        if "step-00000006" in str(path) and os.environ["RANK"] != "0":
            path.mkdir()
        save(tensors, path)

    staging.save_file = hindered


DISTURBANCES = (
    *(hanging, holding_the_lock, spoilt, spoilt_once, slow_data),
    *(elsewhere, unwritable),
)

if __name__ == "__main__":
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("RANK", "0")
    what = sys.argv.pop(1)
    {disturb.__name__: disturb for disturb in DISTURBANCES}[what]()
    run_cli(train.main)
