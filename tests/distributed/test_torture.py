"""A run that is ended again and again, at any moment, is the run that nothing ever happened to."""

import json
import random
import re
import shutil
import signal
import time
from itertools import chain
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from tests.distributed import torture_train
from tests.distributed.runs import damage, records, train

# The rate is that of a long warm-up. A higher one makes the first steps chaotic: what other ranks
# round in another order then grows beyond 1e-5, in runs that nothing happens to as well.
COURSE = (
    *("data.image_size=64", "data.workers=1", "batch.global_images=12", "precision=fp32"),
    *("schedule.warmup=4", "optim.lr=5e-5", "eval.every=6", "eval.images=24"),
    *("checkpoint.every=3", "checkpoint.keep=1"),
)
FOREVER = "run.steps=100000"
KILL, SAVE, TERM, START = "SIGKILL", "SIGKILL during a save", "SIGTERM", "SIGKILL at the start"
SHORT = (TERM, SAVE, KILL, KILL)
LONG = (*[KILL] * 8, *[SAVE] * 8, *[TERM] * 6, *[START] * 3)
MICRO = {1: (4, 6, 12), 2: (2, 3, 6), 3: (1, 2, 4)}  # divisors of a rank's share
BEGINS = re.compile(r"(?:starting|resuming (\S+)) at step (\d+) of")


class Torture:
    """A run that is launched again and again, and what is seen of it from outside.

    Attributes:
        launches: of each, the folder of its notes and what it printed.
        torn: half-written checkpoints that were left behind.
    """

    def __init__(self, launch, shards, folder, seed):
        self.launch, self.course = launch, (*COURSE, f"data.path={shards}")
        self.run, self.notes = folder / "run", folder / "notes"
        self.random = random.Random(seed)
        self.launches = []
        self.torn = 0

    def start(self, ranks, *overrides, blow=None):
        """Launch it until it ends, by itself or by a blow."""
        newest, notes = self.newest(), self.notes / f"{len(self.launches):02d}"
        notes.mkdir(parents=True)
        done = train(
            *(self.launch, self.course, self.run, ranks, *overrides),
            script=(torture_train.__file__, notes),
            meanwhile=lambda: blow and self.strike(blow, ranks, notes),
        )
        self.launches.append(SimpleNamespace(notes=notes, output=done.stdout))
        self.torn += len(self.half_written())
        for path in self.checkpoints():
            assert damage(path) is None
        # nothing torn was loaded and nothing is lost: it went on from the newest one, if it got
        # that far, and has left none that is older
        assert newest is None or any(path >= newest for path in self.checkpoints())
        for begins in BEGINS.findall(done.stdout):
            assert begins == ((str(newest), str(step_of(newest))) if newest else ("", "0"))
        assert "passed over" not in done.stdout
        return done

    def strike(self, blow, ranks, notes):
        """Wait for a blow's moment, see that every checkpoint is whole meanwhile, and strike."""
        victim = 0 if blow == SAVE else self.random.randrange(ranks)
        steps, looked_at, before = self.random.randint(2, 6), set(), self.half_written()
        wait_for(lambda: list(notes.glob(f"{victim}-*")))
        (file,) = notes.glob(f"{victim}-*")
        process = psutil.Process(int(file.stem.split("-")[-1]))

        def its_moment():
            for path in set(self.checkpoints()) - looked_at:
                looked_at.add(path)
                assert damage(path) is None or not path.exists()  # an old one, deleted meanwhile
            if blow == SAVE:
                return self.half_written() - before
            return blow == START or len(file.read_text().splitlines()) >= steps

        wait_for(lambda: its_moment() or not process.is_running())
        at_most = {SAVE: 0.3, START: 5.0}.get(blow, 0.5)
        time.sleep(self.random.choice([0, self.random.uniform(0, at_most)]))
        process.send_signal(signal.SIGTERM if blow == TERM else signal.SIGKILL)

    def checkpoints(self):
        return sorted((self.run / "checkpoints").glob("step-????????"))

    def newest(self):
        return max(self.checkpoints(), default=None)

    def half_written(self):
        """Staging folders, each with the time of its last file: of a name there may be several."""
        found = set()
        for path in (self.run / "checkpoints").glob("*.partial"):
            try:
                found.add((path.name, path.stat().st_mtime_ns))
            except FileNotFoundError:
                continue
        return found

    def global_batches(self, launch):
        """{step: sample numbers in the order of positions}, of what all ranks have consumed."""
        ranks = []
        for path in sorted(launch.notes.iterdir()):
            notes = map(json.loads, path.read_text().splitlines())
            ranks.append({note["step"]: note["rows"] for note in notes})
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1  # none goes ahead of the others
        steps = set.intersection(*map(set, ranks))
        # the n-th micro-batches of all ranks lie side by side
        sides = {step: zip(*(rank[step] for rank in ranks), strict=True) for step in steps}
        return {step: list(chain(*chain(*side))) for step, side in sides.items()}


def wait_for(come):
    deadline = time.monotonic() + 120
    while not come():
        assert time.monotonic() < deadline, "the run does not get anywhere"
        time.sleep(0.002)


def step_of(path):
    return int(path.name.removeprefix("step-"))


@pytest.fixture(scope="module", params=["short", pytest.param("long", marks=pytest.mark.slow)])
def runs(request, launch, real_shards, tmp_path_factory):
    """(tortured, uninterrupted): the same steps of the same run."""
    folder = tmp_path_factory.mktemp("torture")
    tortured = Torture(launch, real_shards, folder / "tortured", request.param)
    blows = list(SHORT if request.param == "short" else LONG)
    if request.param == "long":
        tortured.random.shuffle(blows)
    for number, blow in enumerate(blows):
        ranks, stage = (2, 3, 1)[number % 3], (3, 3, 3, 1, 3, 2, 3, 0)[number % 8]
        micro = tortured.random.choice(MICRO[ranks])
        now = (f"batch.micro={micro}", f"zero.stage={stage}", FOREVER)
        done = tortured.start(ranks, *now, blow=blow)
        code = 75 if blow == TERM else -9
        assert f"exitcode  : {code} " in done.stderr, done.stderr[-3000:]
        if blow == TERM:
            assert (tortured.run / "requeue").exists()
    course = (f"run.steps={step_of(tortured.newest()) + 4}", "zero.stage=3")
    uninterrupted = Torture(launch, real_shards, folder / "uninterrupted", 0)
    for run in (tortured, uninterrupted):
        done = run.start(2, *course)
        assert done.returncode == 0, done.stderr[-3000:]
    yield tortured, uninterrupted
    shutil.rmtree(folder)


def test_every_global_batch_has_the_galaxies_of_the_uninterrupted_run(runs):
    tortured, uninterrupted = runs
    expected = uninterrupted.global_batches(uninterrupted.launches[0])
    consumed = set()
    for launch in tortured.launches:
        batches = tortured.global_batches(launch)
        for step in batches.keys() & expected.keys():  # the others were lost by a blow
            assert batches[step] == expected[step]
        if batches:
            assert min(batches) == int(BEGINS.search(launch.output)[2])
        consumed |= batches.keys()
    assert consumed >= expected.keys()


def test_all_losses_are_those_of_the_uninterrupted_run(runs):
    for kind, keys in (("train", ("loss", "grad_norm", "lr")), ("val", ("loss", "loss_zeros"))):
        found, expected = (records(one.run, kind) for one in runs)
        for key in keys:
            difference = np.subtract([r[key] for r in found], [r[key] for r in expected])
            assert np.abs(difference).max() <= 1e-5, (kind, key)


def test_the_records_have_each_step_once(runs):
    steps = [record["step"] for record in records(runs[0].run)]
    assert steps == list(range(1, len(steps) + 1))
    for kind, keys in (("train", ("step", "updates", "samples")), ("val", ("step", "n"))):
        found, expected = (records(one.run, kind) for one in runs)
        assert [[r[key] for key in keys] for r in found] == [[r[k] for k in keys] for r in expected]


def test_nothing_half_written_stays(runs):
    tortured, _ = runs
    assert tortured.torn  # a blow did strike a save
    names = sorted(path.name for path in (tortured.run / "checkpoints").iterdir())
    assert names == [path.name for path in tortured.checkpoints()][-1:]
    assert (tortured.run / "latest").read_text() == f"{names[-1]}\n"
    assert (tortured.run / "complete").exists() and not (tortured.run / "requeue").exists()
