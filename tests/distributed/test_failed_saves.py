"""A save that fails costs that save and nothing else, and a bad checkpoint is one less to read."""

import shutil
import subprocess
import time

import numpy as np
import pytest

from astropt_ds.config_source import load_config
from astropt_ds.flops import parameters
from tests.conftest import TINY
from tests.distributed import disturbed_train
from tests.distributed.runs import alone, damage, events, losses, records, train

EVERY = 10
STEPS = 12 * EVERY
CHECKPOINT_BYTES = 12 * parameters(load_config("1m", TINY).model)  # and a little more
DISK_BYTES = 20 * CHECKPOINT_BYTES


def checkpoints(run):
    """By their steps; none is damaged, and there is nothing else."""
    paths = sorted((run / "checkpoints").glob("step-????????"))
    assert [damage(path) for path in paths] == [None] * len(paths)
    others = {path.name for path in (run / "checkpoints").iterdir()} - {p.name for p in paths}
    assert others <= {"ballast"}
    return [int(path.name.removeprefix("step-")) for path in paths]


def steps(run, event):
    return [found["step"] for found in events(run, event)]


# ---- a full disk -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose checkpoints go to a small disk of their own."""
    run = tmp_path_factory.mktemp("full") / "run"
    disk = run / "checkpoints"
    disk.mkdir(parents=True)
    mount = ("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk)
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be made: {mounted.stderr.strip()}")
    yield run
    subprocess.run(("umount", disk), check=True)


def fill(run):
    """Leave space for one checkpoint and a half."""
    free = shutil.disk_usage(run / "checkpoints").free
    (run / "checkpoints" / "ballast").write_bytes(bytes(free - CHECKPOINT_BYTES * 3 // 2))


def free(run):
    (run / "checkpoints" / "ballast").unlink()


@pytest.fixture(scope="module")
def freed(launch, tiny, run):
    """A run on a disk that is full after the first checkpoint and until a save has failed."""
    fill(run)
    seen = {}

    def meanwhile():
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not events(run, "checkpoint_failed"):
            assert time.monotonic() < deadline, "no save fails"
            time.sleep(0.02)
        seen["pointer"] = (run / "latest").read_text()
        seen["damage"] = damage(run / "checkpoints" / f"step-{EVERY:08d}")
        free(run)

    done = course(launch, tiny, run, STEPS, meanwhile=meanwhile)
    return done, seen


def course(launch, tiny, run, steps, **options):
    overrides = (f"checkpoint.every={EVERY}", "checkpoint.keep=null", "eval.every=1000")
    return alone(launch, tiny, run, *overrides, f"run.steps={steps}", **options)


@pytest.mark.needs("tmpfs")
def test_a_run_goes_on_when_the_disk_is_full_and_saves_again_when_it_is_not(freed, run):
    done, seen = freed
    assert done.returncode == 0, done.stderr[-3000:]
    assert seen == {"pointer": f"step-{EVERY:08d}\n", "damage": None}
    saved, failed = steps(run, "checkpoint"), steps(run, "checkpoint_failed")
    assert failed[0] == 2 * EVERY
    assert "No space left on device" in events(run, "checkpoint_failed")[0]["text"]
    assert sorted(saved + failed) == list(range(EVERY, STEPS + 1, EVERY))
    assert checkpoints(run) == saved
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))


@pytest.mark.needs("tmpfs")
def test_where_the_last_save_fails_the_command_says_so_and_goes_on_from_the_one_before(
    launch, tiny, freed, run
):
    assert freed[0].returncode == 0
    before = checkpoints(run)
    fill(run)
    done = course(launch, tiny, run, STEPS + 2 * EVERY)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line and "goes on from the one before" in line
    assert "Traceback" not in done.stderr
    assert checkpoints(run) == [*before, STEPS + EVERY]
    assert not (run / "complete").exists()
    free(run)
    done = course(launch, tiny, run, STEPS + 2 * EVERY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"at step {STEPS + EVERY} of {STEPS + 2 * EVERY}" in done.stdout
    assert checkpoints(run) == [*before, STEPS + EVERY, STEPS + 2 * EVERY]
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 2 * EVERY + 1))


# ---- one rank of two ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hindered(launch, tiny, tmp_path_factory):
    """Twelve steps on two ranks, a save every three; the second rank cannot write its part once."""
    run = tmp_path_factory.mktemp("hindered") / "run"
    script = (disturbed_train.__file__, "unwritable")
    now = ("run.steps=12", "zero.stage=3", "checkpoint.keep=null")
    return run, train(launch, tiny, run, 2, *now, script=script)


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_the_run_goes_on(hindered):
    run, done = hindered
    assert done.returncode == 0, done.stderr[-3000:]
    (failed,) = events(run, "checkpoint_failed")
    assert failed["step"] == 6
    assert "warning: checkpoint of step 6 failed: rank 1: " in failed["text"]
    assert "rank-00001.safetensors: cannot be written" in failed["text"]
    assert done.stdout.count("cannot be written") == 1
    assert checkpoints(run) == steps(run, "checkpoint") == [3, 9, 12]
    assert (run / "latest").read_text() == "step-00000012\n"


def test_damage_that_only_one_rank_has_read_passes_a_checkpoint_over_on_all(
    launch, tiny, hindered, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(hindered[0], run)
    first, second = (f"rank-{rank:05d}.safetensors" for rank in (0, 1))  # each reads its own
    newest, older = (run / "checkpoints" / name for name in ("step-00000012", "step-00000009"))
    data = bytearray((newest / second).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / second).write_bytes(data)
    (older / first).unlink()
    now = ("run.steps=12", "zero.stage=3", "checkpoint.keep=null")
    done = train(launch, tiny, run, 2, *now)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [event["text"] for event in events(run, "checkpoint_passed_over")]
    assert [line.partition("; renamed to ")[0] for line in said] == [
        f"passed over {newest}: {second} does not match its checksum",
        f"passed over {older}: {first} is missing",
    ]
    aside = sorted((run / "checkpoints").glob("*.damaged-*"))
    assert sorted(line.partition("; renamed to ")[2] for line in said) == [p.name for p in aside]
    for path in aside:
        shutil.rmtree(path)
    assert f"resuming {run / 'checkpoints' / 'step-00000003'} at step 3 of 12" in done.stdout
    assert np.array_equal(losses(run), losses(hindered[0]))
    assert checkpoints(run) == [3, 6, 9, 12]  # the damaged ones were written anew
