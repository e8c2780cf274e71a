"""The data engine in real runs: resumed on other ranks, and what happens to it from outside."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from astropt_ds.data.store import Folder
from tests.conftest import REPOSITORY, TINY
from tests.distributed.runs import ranks_of, records, train, wait_for_step


@pytest.fixture(scope="module")
def shards(real_shards):
    return real_shards


@pytest.fixture(scope="module")
def tiny(shards):
    return (*TINY, f"data.path={shards}")


def test_a_run_on_two_then_three_then_one_rank_is_that_on_two(launch, tiny, tmp_path):
    course = ("run.steps=9", "data.augment=dihedral", "zero.stage=3")
    whole = tmp_path / "whole"
    done = train(launch, tiny, whole, 2, *course, "data.workers=1")
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    for ranks, steps, workers in ((2, 3, 2), (3, 6, 0), (1, 9, 3)):
        now = (f"run.steps={steps}", f"data.workers={workers}")
        done = train(launch, tiny, run, ranks, *course, *now)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, found = records(whole), records(run)
    assert [r["step"] for r in found] == list(range(1, 10))
    for key in ("loss", "grad_norm"):
        assert np.abs([r[key] - e[key] for r, e in zip(found, expected, strict=True)]).max() <= 1e-5


def test_a_run_whose_shards_have_changed_is_not_resumed(launch, tiny, shards, tmp_path):
    copy, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, copy)
    where = f"data.path={copy}"
    done = train(launch, tiny, run, 1, where, "run.steps=3", launcher="python")
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = Folder(copy).manifest
    for shard in manifest.splits["val"].shards:  # as if made anew from other images
        shard.sha256 = "0" * 64
    manifest.save(copy)
    done = train(launch, tiny, run, 1, where, "run.steps=4", launcher="python")
    assert done.returncode == 2
    assert "was made from other images, sources or weights" in done.stderr.splitlines()[-1]


def test_several_sources_are_logged_as_drawn(launch, tiny, shards, tmp_path):
    others = [o for o in tiny if not o.startswith("data.path")]
    mixture = [f"data.sources.{name}.path={shards}" for name in "ab"]
    run = tmp_path / "run"
    weights = ("data.sources.a.weight=3", "run.steps=4")
    done = train(launch, others, run, 1, *mixture, *weights, launcher="python")
    assert done.returncode == 0, done.stderr[-3000:]
    for record in records(run):
        assert sum(record["drawn"].values()) == pytest.approx(1)
        assert list(record["drawn"]) == ["a", "b"]
    assert 0.5 < records(run)[-1]["drawn"]["a"] < 0.95


# ---- what happens from outside: all ranks stop, with one line, and the run goes on later --------


def stopped(done, run, message):
    """The run ended by itself, with the message as its last words."""
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and message in said[0], done.stderr[-3000:]
    assert "Traceback" not in done.stderr.partition("error: ")[0]
    assert not (run / "complete").exists()


def test_a_killed_worker_stops_all_ranks_and_the_run_can_go_on(launch, tiny, tmp_path):
    run = tmp_path / "run"
    course = ("data.workers=2", "zero.stage=3", "eval.every=100000")

    def kill():
        wait_for_step(run, 4)
        (_, second) = ranks_of(run)
        os.kill(second.children()[0].pid, signal.SIGKILL)

    done = train(
        launch, tiny, run, 2, *course, "run.steps=100000", "checkpoint.every=2", meanwhile=kill
    )
    stopped(done, run, "rank 1: reading process ")
    assert "killed by signal 9" in done.stderr
    last = records(run)[-1]["step"]
    done = train(launch, tiny, run, 1, *course, f"run.steps={last + 1}", launcher="python")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r["step"] for r in records(run)] == list(range(1, last + 2))


def test_a_shard_lost_under_way_stops_all_ranks(launch, tiny, shards, tmp_path):
    copy, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, copy)

    def harm():
        wait_for_step(run, 4)
        for path in copy.glob("train-*.tar"):
            path.rename(path.with_suffix(".gone"))

    # at most two shards of a window stay open: the next one is missed
    course = ("data.window=1", "data.workers=1", "run.steps=100000", "eval.every=100000")
    done = train(launch, tiny, run, 2, f"data.path={copy}", *course, meanwhile=harm)
    stopped(done, run, ".tar: No such file or directory")


def test_a_shard_that_is_bad_as_a_whole_stops_all_ranks(launch, tiny, shards, tmp_path):
    copy, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, copy)
    shard = Folder(copy).manifest.splits["train"].shards[1]
    (copy / shard.name).write_bytes(bytes(shard.bytes))
    # of many images, so that it is no matter of their fraction
    course = ("data.workers=2", "run.steps=100", "data.max_bad_fraction=0.5")
    done = train(launch, tiny, run, 2, f"data.path={copy}", *course)
    stopped(done, run, f"{shard.name}: ")
    more_than_half = shard.samples // 2 + 1
    assert f"{more_than_half} of its {shard.samples} images could not be used" in done.stderr
    named = {r["key"] for r in records(run, "event") if r["event"] == "bad_sample"}
    assert len(named) >= more_than_half


def test_a_web_server_that_dies_stops_all_ranks(launch, tiny, shards, tmp_path):
    log, run = tmp_path / "log", tmp_path / "run"
    server = subprocess.Popen(
        [sys.executable, REPOSITORY / "tests" / "server.py", shards, log, "none"]
    )
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.02)
    url = f"http://127.0.0.1:{log.read_text().split()[0]}"
    largest = max(shard.bytes for shard in Folder(shards).manifest.splits["train"].shards)
    # a cache that has to drop shards, or all would soon be in it
    where = (f"data.path={url}", f"data.cache={tmp_path / 'cache'}", "data.retries=1")
    course = ("data.window=1", "data.workers=1", "run.steps=100000", "eval.every=100000")

    def kill():
        wait_for_step(run, 4)
        server.kill()

    try:
        done = train(
            launch,
            tiny,
            run,
            2,
            *(*where, *course, f"data.cache_gb={3.1 * largest / 1e9}"),
            meanwhile=kill,
        )
    finally:
        server.kill()
    stopped(done, run, "cannot be fetched, tried 2 times")
