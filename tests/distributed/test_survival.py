"""What may end a run from outside, and what is left of it: signals, clocks, hangs, folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from astropt_ds.training.pace import Place
from tests.conftest import REPOSITORY
from tests.distributed import disturbed_train
from tests.distributed.runs import (
    alone,
    events,
    losses,
    process_of,
    ranks_of,
    records,
    train,
    wait_for_step,
)

ENDLESS = ("run.steps=100000", "eval.every=100000", "checkpoint.every=100000")


def disturbed(what):
    return (disturbed_train.__file__, what)


def last_words(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def stopped(launch, tiny, tmp_path_factory):
    """A run on two ranks, of which the second gets a signal; and the step it had made by then."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    seen = {}

    def meanwhile():
        wait_for_step(run, 4)
        seen["step"] = len(records(run))
        ranks_of(run)[1].send_signal(signal.SIGUSR1)

    done = train(launch, tiny, run, 2, *ENDLESS, "zero.stage=3", meanwhile=meanwhile)
    return run, done, seen["step"]


def test_a_signal_to_any_rank_saves_at_the_next_boundary_and_says_so(stopped):
    run, done, seen = stopped
    assert done.returncode != 0 and not last_words(done)
    assert "exitcode  : 75" in done.stderr  # as the launcher reports it
    (event,) = events(run, "stop")
    step = event["step"]
    assert step >= seen and step == records(run)[-1]["step"]
    assert (event["reason"], event["rank"]) == ("SIGUSR1", 1)
    assert 0 < event["durable_s"] < 30
    assert (run / "latest").read_text() == f"step-{step:08d}\n"
    assert f"saved at step {step}" in (run / "requeue").read_text()
    assert not (run / "complete").exists()
    (saved,) = events(run, "checkpoint")
    assert saved["step"] == step and 0 <= saved["stall_s"] <= saved["durable_s"]


def test_the_same_command_goes_on_from_there(launch, tiny, stopped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped[0], run)
    step = records(run)[-1]["step"]
    with (run / "metrics.jsonl").open("a") as file:  # of a run that went on, and died soon
        file.write(json.dumps({**records(run, "val")[0], "step": step}) + "\n")
    done = alone(launch, tiny, run, f"run.steps={step + 2}", f"eval.every={step}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"at step {step} of {step + 2}" in done.stdout
    assert [r["step"] for r in records(run)] == list(range(1, step + 3))
    assert [r["step"] for r in records(run, "val")] == [0, step, step + 2]
    assert (run / "complete").exists() and not (run / "requeue").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_exit_code_says_run_me_again(launch, tiny, tmp_path, number):
    run = tmp_path / "run"

    def meanwhile():
        wait_for_step(run, 2)
        for _ in range(2):  # as a terminal and a launcher both pass it on
            process_of(run).send_signal(number)

    done = alone(launch, tiny, run, *ENDLESS, meanwhile=meanwhile)
    assert done.returncode == 75
    assert "the same command goes on" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert events(run, "stop")[0]["reason"] == signal.Signals(number).name


def test_a_second_signal_ends_at_once_whatever_the_run_is_at(launch, tiny, tmp_path):
    run = tmp_path / "run"
    sent = []

    def meanwhile():
        wait_for_step(run, 3)
        for pause in (0.5, 1.5):  # it hangs by now, and goes on hanging
            time.sleep(pause)
            sent.append(time.monotonic())
            process_of(run).send_signal(signal.SIGTERM)

    script = disturbed("hanging")
    done = alone(launch, tiny, run, *ENDLESS, script=script, meanwhile=meanwhile)
    assert time.monotonic() - sent[1] < 5
    assert done.returncode == 128 + signal.SIGTERM
    assert "SIGTERM again: ending at once" in done.stderr


def test_ranks_whose_launcher_is_gone_save_and_end(launch, tiny, tmp_path):
    run = tmp_path / "run"

    def meanwhile():
        wait_for_step(run, 4)
        ranks_of(run)[0].parent().send_signal(signal.SIGUSR1)  # which torchrun dies of

    done = train(launch, tiny, run, 2, *ENDLESS, "zero.stage=1", meanwhile=meanwhile)
    assert done.returncode == -signal.SIGUSR1  # its output ends once all ranks have
    (event,) = events(run, "stop")
    assert event["reason"] == "the end of torchrun"
    assert (run / "requeue").exists()
    assert (run / "latest").read_text() == f"step-{event['step']:08d}\n"


def test_its_time_being_up_stops_a_run_like_a_signal(launch, tiny, tmp_path):
    run = tmp_path / "run"
    done = alone(launch, tiny, run, *ENDLESS, "run.max_hours=0.0005")
    assert done.returncode == 75
    assert events(run, "stop")[0]["reason"] == "run.max_hours=0.0005"
    assert (run / "latest").exists()


def test_a_hang_of_one_rank_ends_all_and_every_rank_leaves_its_stack(launch, tiny, tmp_path):
    run = tmp_path / "run"
    seconds = 4
    started = []

    def meanwhile():
        wait_for_step(run, 3)
        started.append(time.monotonic())

    overrides = (*ENDLESS, "zero.stage=3", f"health.hang_minutes={seconds / 60}")
    script = disturbed("hanging")
    done = train(launch, tiny, run, 2, *overrides, script=script, meanwhile=meanwhile)
    assert time.monotonic() - started[0] < 3 * seconds + 10  # with the launcher's own end
    assert done.returncode != 0 and not ranks_of(run)
    assert "exitcode  : 70" in done.stderr
    assert last_words(done) and "no step for" in last_words(done)[0]
    first, second = sorted((run / "stacks").iterdir())
    assert "rank 0, process " in first.read_text() and "in step" in first.read_text()
    assert "rank 1, process " in second.read_text() and "in stand_still" in second.read_text()


def test_a_hang_that_no_thread_of_python_sees_ends_too(launch, tiny, tmp_path):
    run = tmp_path / "run"
    started = []

    def meanwhile():
        wait_for_step(run, 3)
        started.append(time.monotonic())

    overrides = (*ENDLESS, f"health.hang_minutes={3 / 60}")
    script = disturbed("holding_the_lock")
    done = alone(launch, tiny, run, *overrides, script=script, meanwhile=meanwhile)
    assert time.monotonic() - started[0] < 15
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in <lambda>" in done.stderr


def test_a_full_disk_under_the_log_does_not_end_a_run(tiny, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "astropt_ds.train", "--config", "1m", *tiny, "run.steps=4"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, f"run.dir={run}"], stdout=full, stderr=full, env=environment, timeout=120
        )
    assert done.returncode == 0
    assert len(records(run)) == 4 and (run / "complete").exists()


def test_a_rank_that_waits_for_its_data_is_named(launch, tiny, tmp_path):
    run = tmp_path / "run"
    overrides = ("run.steps=4", "health.pace_every=2", "data.workers=0")
    done = train(launch, tiny, run, 2, *overrides, script=disturbed("slow_data"))
    assert done.returncode == 0, done.stderr[-3000:]
    for event in events(run, "pace"):
        assert [len(event[key]) for key in Place._fields] == [2] * len(Place._fields)
        assert event["data_wait_s"][1] > 0.1 > event["data_wait_s"][0]
    named = [event["text"] for event in events(run, "straggler") if "for data" in event["text"]]
    assert len(named) == 2 and all(f"rank 1 on {os.uname().nodename} waits" in t for t in named)


def test_a_run_folder_that_not_all_ranks_see_is_refused(launch, tiny, tmp_path):
    done = train(
        *(launch, tiny, "run", 2, "run.steps=2"),
        script=disturbed("elsewhere"),
        cwd=tmp_path,
    )
    assert done.returncode != 0
    (line,) = last_words(done)
    assert line.startswith("error: rank 1: run.dir=run: on ")
    assert "another folder than rank 0's; one that all nodes share would be right" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_schedule_extended_before_its_decay_leaves_no_trace(launch, tiny, tmp_path):
    wsd = ("schedule.kind=wsd", "zero.stage=1")
    short = ("schedule.decay_from=4", "schedule.decay_until=6")
    long = ("run.steps=6", "schedule.decay_from=5", "schedule.decay_until=8")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert alone(launch, tiny, whole, *wsd, *long).returncode == 0
    assert alone(launch, tiny, run, *wsd, *short, "run.steps=4").returncode == 0
    assert alone(launch, tiny, run, *wsd, *long).returncode == 0
    assert losses(run) == losses(whole)
    assert not [e for e in events(run, "warning") if "schedule was" in e["text"]]
    late = ("run.steps=7", "schedule.decay_from=7", "schedule.decay_until=8")
    done = alone(launch, tiny, run, *wsd, *late)
    assert done.returncode == 0
    assert "warning: the schedule was another one from update 6 on" in done.stdout
