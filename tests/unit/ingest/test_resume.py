"""A job that is interrupted goes on, and ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
from PIL import Image

from astropt_ds.errors import UserError
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from tests.conftest import REPOSITORY, write_images

IMAGES = 60
COUNT = 3  # finished shards to wait for


class Command:
    """The real command, in the middle of its work."""

    def __init__(self, job):
        command = [sys.executable, REPOSITORY / "tools/make_shards.py"]
        command += ["--images", job.images, "--output", job.output, "--processes", "2"]
        command += ["--samples-per-shard", "2"]
        environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
        self.records = job.output.with_name(job.output.name + ".partial") / "records"
        before = self.finished()
        self.process = subprocess.Popen(
            command,
            **{"env": environment, "start_new_session": True, "text": True},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            # a shell's background job, which this may be part of, has it ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while len(self.finished() - before) < COUNT:
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.005)

    def finished(self):
        return {path.stem for path in self.records.glob("*-*.json")}

    def workers(self):
        """Those of its processes that write."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def end(self):
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One job, ended three ways in the middle and then let run; what was seen on the way."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "images").mkdir()
    first = folder / "images" / "0000.png"  # slow to decode: there must be a middle
    Image.fromarray(np.zeros((1500, 1500, 3), np.uint8)).save(first)
    for i in range(1, IMAGES):
        os.link(first, folder / "images" / f"{i:04d}.png")
    (folder / "images" / "bad.png").write_bytes(b"")
    job = Job(images=folder / "images", output=folder / "shards", samples_per_shard=2)
    partial = folder / "shards.partial"
    seen = {"job": job}

    command = Command(job)
    with pytest.raises(UserError) as seen["at once"]:
        make_shards(job)
    workers = command.workers()
    command.process.kill()
    seen["killed"] = command.end()
    seen["finished"] = {n: (partial / f"{n}.tar").stat().st_mtime_ns for n in command.finished()}
    seen["orphans"] = psutil.wait_procs(workers, timeout=10)[1]

    with pytest.raises(UserError) as seen["other job"]:
        make_shards(replace(job, min_side=20))
    (folder / "images" / "new.png").write_bytes(b"")
    with pytest.raises(UserError) as seen["other images"]:
        make_shards(job)
    (folder / "images" / "new.png").unlink()

    command = Command(job)
    command.workers()[0].kill()
    seen["worker killed"] = command.end()

    command = Command(job)
    os.killpg(command.process.pid, signal.SIGINT)
    seen["interrupted"] = command.end()

    said = []
    seen["left"] = len(list((partial / "records").glob("*-*.json")))
    make_shards(job, said.append)
    seen["said"] = said
    return seen


def test_a_killed_job_goes_on_to_the_same_bytes(story):
    job = story["job"]
    whole = replace(job, output=job.output.with_name("uninterrupted"), processes=1)
    make_shards(whole)
    assert contents(job.output) == contents(whole.output)
    assert story["killed"][0] == -signal.SIGKILL
    left = {path.name for path in job.output.parent.iterdir()}
    assert left == {"images", "shards", "uninterrupted"}


def test_finished_shards_are_not_written_again(story):
    output = story["job"].output
    assert len(story["finished"]) >= COUNT
    for name, written in story["finished"].items():
        assert (output / f"{name}.tar").stat().st_mtime_ns == written, name
    shards = len(list(output.glob("*.tar")))
    assert story["said"] == [f"goes on from {story['left']} finished shards of {shards}"]
    assert f"goes on from {len(story['finished'])} finished" in story["worker killed"][1]


def test_no_process_outlives_its_command(story):
    assert story["orphans"] == []


def test_a_second_command_on_the_same_output_is_refused(story):
    output = story["job"].output
    expected = f"--output {output}: another command is at it; wait for its end"
    assert str(story["at once"].value) == expected


def test_another_job_does_not_go_on_from_what_this_one_left(story):
    message = str(story["other job"].value)
    assert "--min-side was 16 there, not 20" in message and "remove it to start anew" in message


def test_the_death_of_a_process_is_one_line(story):
    code, _, err = story["worker killed"]
    assert code == 2
    assert "one of them was killed" in err and err.startswith("error: ") and err.count("\n") == 1
    assert "the same command again" in err


def test_an_interrupt_ends_in_one_line(story):
    code, _, err = story["interrupted"]
    assert code == 130
    assert err.strip() == "interrupted; the same command goes on from what is saved"


def test_images_that_changed_since_are_not_mixed_with_those_before(story):
    message = str(story["other images"].value)
    assert "the images or their tables are others now" in message


def test_a_shard_whose_images_have_changed_is_written_again(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(IMAGES):
        Image.fromarray(np.full((1500, 1500, 3), i, np.uint8)).save(images / f"{i:04d}.png")
    job = Job(images=images, output=tmp_path / "shards", samples_per_shard=2)
    command = Command(job)
    command.process.kill()
    command.end()
    done = sorted(command.finished())[0]
    record = json.loads((command.records / f"{done}.json").read_text())
    changed = images / f"{record['rows'][0][0]}.png"
    Image.fromarray(np.full((1500, 1500, 3), 200, np.uint8)).save(changed)
    make_shards(job, [].append)
    fresh = replace(job, output=tmp_path / "fresh")
    make_shards(fresh, [].append)
    assert contents(job.output) == contents(fresh.output)


def test_a_folder_of_someone_else_is_not_touched(tmp_path):
    catalogue = write_images(tmp_path, 2)
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"s.partial: .* was not left by this command; remove it"):
        make_shards(Job(images=tmp_path, catalogue=catalogue, output=tmp_path / "s"))
    assert contents(tmp_path / "s.partial") == {"notes": b"mine"}
