"""Claims: one task at a time has a part, and what a dead one had is taken over."""

import json
import os
import signal
import subprocess
import sys
import time

from astropt_ds.embedding.claims import Claims, _take_away

HOLD = """
import sys, time
from pathlib import Path
from astropt_ds.embedding.claims import Claims
with Claims(Path(sys.argv[1])) as claims:
    print(claims.take("part"), flush=True)
    sys.stdin.read()
"""


def holder(folder):
    """A process that holds a claim until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "True\n"
    return process


def elsewhere(folder, name):
    """A claim of a task on another machine."""
    owner = {"host": "another one", "pid": os.getpid(), "started": 0.0}
    (folder / name).write_text(json.dumps(owner))
    return folder / name


def test_a_claim_is_had_once_until_it_is_released(tmp_path):
    one, other = Claims(tmp_path), Claims(tmp_path)
    assert one.take("part")
    assert not other.take("part") and not one.take("part")
    assert other.take("another")
    one.release("part")
    assert other.take("part")


def test_what_a_killed_process_had_is_taken_over_and_what_a_live_one_has_is_not(tmp_path):
    with holder(tmp_path) as process:
        claims = Claims(tmp_path, lost_s=0.0)
        assert not claims.take("part")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert claims.take("part")
        assert not Claims(tmp_path).take("part")


def test_a_process_that_ends_lets_go(tmp_path):
    with holder(tmp_path) as process:
        process.communicate()
        assert list(tmp_path.iterdir()) == []


def test_another_machines_claim_is_lost_only_when_nobody_touches_it_for_long(tmp_path):
    path = elsewhere(tmp_path, "part")
    os.utime(path, (0, 0))  # its clock may be decades behind
    claims = Claims(tmp_path, lost_s=0.2)
    assert not claims.take("part")
    time.sleep(0.3)
    os.utime(path)  # it lives
    assert not claims.take("part")
    time.sleep(0.3)
    assert claims.take("part")


def test_claims_are_touched_while_their_context_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr("astropt_ds.embedding.claims.BEAT_S", 0.02)
    with Claims(tmp_path) as claims:
        claims.take("part")
        os.utime(tmp_path / "part", (0, 0))
        time.sleep(0.2)
        assert time.time() - (tmp_path / "part").stat().st_mtime < 60
    assert not (tmp_path / "part").exists()


def test_a_claim_that_was_never_written_to_its_end_is_lost_in_time(tmp_path):
    (tmp_path / "part").touch()
    claims = Claims(tmp_path, lost_s=0.1)
    assert not claims.take("part")
    time.sleep(0.2)
    assert claims.take("part")


def test_a_task_that_was_taken_for_dead_does_not_let_go_of_its_successors_claim(tmp_path):
    slow, other = Claims(tmp_path), Claims(tmp_path)
    slow.take("part")
    (tmp_path / "part").unlink()  # it was lost
    assert other.take("part")
    slow.release("part")
    assert (tmp_path / "part").exists() and not Claims(tmp_path).take("part")


def test_a_claim_that_another_has_taken_over_first_stays_with_it(tmp_path):
    elsewhere(tmp_path, "part")
    late, fast = Claims(tmp_path, lost_s=0.0), Claims(tmp_path)
    assert not late.take("part")
    text = late._lost(tmp_path / "part")
    assert text is not None  # and now, before it acts on that, another does
    (tmp_path / "part").unlink()
    assert fast.take("part")
    assert not _take_away(tmp_path / "part", text)
    assert not Claims(tmp_path).take("part")
    fast.release("part")
    assert list(tmp_path.iterdir()) == []
