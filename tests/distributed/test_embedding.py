"""Several tasks at one table, killed at any moment: the table is that of one undisturbed task."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from astropt_ds import read_embeddings, save_model
from astropt_ds.config_source import load_config
from astropt_ds.model import AstroPT
from tests.conftest import REPOSITORY

TASKS = 3
SCRIPT = Path(__file__).with_name("embed_in_parts.py")


@pytest.fixture(scope="module")
def command(real_shards, tmp_path_factory):
    """The arguments but for the output: a second or two of work for three tasks."""
    folder = tmp_path_factory.mktemp("model") / "1m"
    save_model(AstroPT(load_config("1m").model), folder)
    options = ("--layer", "last", "--tokens", "all", "--batch", "4")
    return [SCRIPT, "--model", folder, "--data", real_shards, *options]


def start(command, output, log=subprocess.DEVNULL):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    arguments = [sys.executable, *map(str, command), "--output", str(output)]
    return subprocess.Popen(
        arguments, env=environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT
    )


def parts_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "table"
    assert start(command, output).wait(300) == 0
    return output


def is_at_work(process, output):
    """Whether a task has claimed a part."""
    for path in (output / "_claims").glob("part-*"):
        try:
            if json.loads(path.read_text())["pid"] == process.pid:
                return True
        except (OSError, ValueError):
            continue
    return False


def strike(processes, output, rng):
    """Kill the tasks one by one: most while they are at work, some while they start."""
    killed = at_work = 0
    for process in rng.sample(processes, len(processes)):
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, 1))
        else:
            while process.poll() is None and not is_at_work(process, output):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
        at_work += is_at_work(process, output)
        if process.poll() is None:
            process.kill()
            killed += 1
        process.wait()
    return killed, at_work


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_tasks_leave_nothing_undone_and_nothing_twice(
    rounds, command, undisturbed, tmp_path
):
    rng, output, log = random.Random(rounds), tmp_path / "table", tmp_path / "log"
    kills = blows = 0
    for _ in range(rounds):
        killed, at_work = strike([start(command, output) for _ in range(TASKS)], output, rng)
        kills, blows = kills + killed, blows + at_work
        if (output / "_manifest.json").exists():  # all was done: take some of it away
            for path in rng.sample(sorted(output.glob("part-*")), 6):
                path.unlink()
    with log.open("w") as file:
        processes = [start(command, output, file) for _ in range(TASKS)]
        codes = [process.wait(300) for process in processes]
    assert codes == [0] * TASKS, log.read_text()
    assert parts_of(output) == parts_of(undisturbed)
    ids = read_embeddings(output, columns=[])["id"]
    assert ids.is_unique and set(ids) == set(read_embeddings(undisturbed, columns=[])["id"])
    assert list((output / "_claims").iterdir()) == []
    assert kills >= rounds and blows > 0


def test_ranks_of_torchrun_share_a_table(launch, command, undisturbed, tmp_path):
    output = tmp_path / "table"
    done = launch(2, *command, "--output", output)
    assert done.returncode == 0, done.stderr
    assert parts_of(output) == parts_of(undisturbed)
    assert done.stdout.count("galaxies embedded") == 1  # the first rank speaks


def test_tasks_that_meet_at_a_table_that_lacks_parts_all_end_well(command, undisturbed, tmp_path):
    output, log = tmp_path / "table", tmp_path / "log"
    shutil.copytree(undisturbed, output)
    for path in random.Random(0).sample(sorted(output.glob("part-*")), 6):
        path.unlink()
    with log.open("w") as file:
        processes = [start(command, output, file) for _ in range(TASKS)]
        codes = [process.wait(300) for process in processes]
    assert codes == [0] * TASKS, log.read_text()
    assert parts_of(output) == parts_of(undisturbed)


def test_tasks_agree_on_a_shard_that_is_missing_and_on_it_when_it_is_there(
    command, undisturbed, real_shards, tmp_path
):
    shards, output, log = tmp_path / "shards", tmp_path / "table", tmp_path / "log"
    shutil.copytree(real_shards, shards)
    here = [shards if part == real_shards else part for part in command]
    path = sorted(shards.glob("train-*.tar"))[1]
    path.rename(tmp_path / "away")
    for codes, words in (([2, 2], "could not be looked at"), ([2, 2], "tries them again")):
        with log.open("w") as file:
            processes = [start(here, output, file) for _ in range(2)]
            assert [process.wait(300) for process in processes] == codes, log.read_text()
        assert log.read_text().count(words) == 2
    (tmp_path / "away").rename(path)
    with log.open("w") as file:
        processes = [start(here, output, file) for _ in range(2)]
        assert [process.wait(300) for process in processes] == [0, 0], log.read_text()
    # the files say where their galaxies came from, which is a copy here
    one, other = (read_embeddings(folder, kind="numpy") for folder in (output, undisturbed))
    assert (one == other).all() and len(one)


def test_a_ranks_mistake_is_one_line_and_code_2(command, tmp_path):
    with (tmp_path / "log").open("w") as log:
        assert start([*command, "--tokens", "0"], tmp_path / "table", log).wait(60) == 2
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("error: --tokens 0: 1 to ")
