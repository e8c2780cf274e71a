import contextlib
import errno
import json
import os
import resource

import pytest

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.training.metrics import Metrics, read_metrics

CONFIG = load_config("1m")


@contextlib.contextmanager
def full_disk(file, room):
    """No file of this process grows beyond what this one has, and some bytes more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps(folder):
    return [(r["kind"], r["step"]) for r in read_metrics(folder)]


def test_records_are_one_json_object_a_line_and_survive_a_resume_once_each(tmp_path):
    metrics = Metrics(tmp_path, 0, CONFIG)
    for step in range(1, 6):
        metrics.write("train", step, loss=1.0 / step, mfu=None)
        if step == 3:
            metrics.write("event", step, event="checkpoint", text="saved")
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    resumed = Metrics(tmp_path, 3, CONFIG)
    resumed.write("train", 4, loss=9.0)
    resumed.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(tmp_path)
    expected = [("train", 1), ("train", 2), ("train", 3), ("event", 3), ("train", 4)]
    assert steps(tmp_path) == expected
    assert read_metrics(tmp_path)[0]["mfu"] is None


def test_a_run_from_the_start_drops_the_records_of_one_that_never_saved(tmp_path):
    first = Metrics(tmp_path, 0, CONFIG)
    first.write("val", 0, loss=1.0)
    first.close()
    Metrics(tmp_path, 0, CONFIG).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("room", [0, 20, 150])  # nothing fits, a part of a line, a line and a part
def test_a_disk_that_is_full_for_a_while_costs_no_record_and_tears_none(tmp_path, room):
    said = []
    metrics = Metrics(tmp_path, 0, CONFIG, warn=said.append)
    metrics.write("train", 1, loss=1.0)
    for begin in (2, 6):  # each time that the disk fills up is told anew
        with full_disk(metrics.path, room):
            for step in (begin, begin + 1, begin + 2):
                metrics.write("train", step, loss=1.0)
                assert metrics.path.read_bytes().endswith(b"}\n")
        metrics.write("train", begin + 3, loss=1.0)
        assert steps(tmp_path) == [("train", step) for step in range(1, begin + 4)]
    metrics.close()
    assert [line.startswith(f"{metrics.path}: cannot be written") for line in said] == [1, 0, 1, 0]
    assert said[1] == said[3] == f"{metrics.path}: is written again, no record is missing"


def test_a_torn_record_that_stays_in_the_file_is_written_over(tmp_path, monkeypatch):
    def refuse(descriptor, length):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "ftruncate", refuse)
    metrics = Metrics(tmp_path, 0, CONFIG, warn=lambda text: None)
    metrics.write("train", 1, loss=1.0)
    with full_disk(metrics.path, 20):
        metrics.write("train", 2, loss=1.0)
    assert not metrics.path.read_bytes().endswith(b"\n")
    assert steps(tmp_path) == [("train", 1)]
    metrics.write("train", 3, loss=1.0)
    metrics.close()
    assert steps(tmp_path) == [("train", 1), ("train", 2), ("train", 3)]


def test_records_that_wait_for_the_disk_are_written_at_the_end(tmp_path):
    metrics = Metrics(tmp_path, 0, CONFIG, warn=lambda text: None)
    with full_disk(metrics.path, 30):
        metrics.write("train", 1, loss=1.0)
    metrics.close()
    assert steps(tmp_path) == [("train", 1)]


def test_records_that_can_never_be_written_are_counted_in_one_line(tmp_path, capsys):
    missing = r"metrics.jsonl: the last 2 records are missing \(.*File too large"
    for failed in (False, True):  # a run that failed has its own error to show
        metrics = Metrics(tmp_path, 0, CONFIG)
        metrics.write("train", 1, loss=1.0)
        expected = contextlib.nullcontext() if failed else pytest.raises(UserError, match=missing)
        with full_disk(metrics.path, 30):
            metrics.write("train", 2, loss=1.0)
            metrics.write("train", 3, loss=1.0)
            with expected:
                metrics.close(failed)
        assert steps(tmp_path) == [("train", 1)]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 + failed
        assert all(line.startswith(f"warning: {metrics.path}: ") for line in lines)


@pytest.mark.parametrize("line", [b"{torn", b"", b"3", b'{"kind": "train"}', b"\xff\x00\xfe"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n' + line + b'\n{"kind": "train", "step": 3}\n')
    before = path.read_bytes()
    for read in (lambda: read_metrics(tmp_path), lambda: Metrics(tmp_path, 1, CONFIG)):
        with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is no record of a run; ") as e:
            read()
        assert "\n" not in str(e.value)
    assert path.read_bytes() == before


def test_records_that_cannot_be_opened_are_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(.*Is a directory"):
        Metrics(tmp_path, 0, CONFIG)


def test_a_disk_that_fails_only_when_it_must_write_costs_no_record(tmp_path, monkeypatch):
    """As on a network's file system, where what was written may be lost by then."""
    metrics = Metrics(tmp_path, 0, CONFIG)
    for step in (1, 2):
        metrics.write("train", step, loss=1.0)
    metrics.sync()
    for step in (3, 4):
        metrics.write("train", step, loss=1.0)

    def lose(descriptor):
        metrics.path.write_bytes(metrics.path.read_bytes()[: metrics._length - 30])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lose)
        with pytest.raises(UserError, match="metrics.jsonl: cannot be written .*No space left"):
            metrics.sync()
    metrics.write("train", 5, loss=1.0)
    metrics.sync()
    metrics.close()
    assert steps(tmp_path) == [("train", step) for step in range(1, 6)]


def test_what_waits_for_the_disk_is_not_on_it(tmp_path):
    metrics = Metrics(tmp_path, 0, CONFIG, warn=lambda text: None)
    with full_disk(metrics.path, 0):
        metrics.write("train", 1, loss=1.0)
        with pytest.raises(UserError, match="cannot be written"):
            metrics.sync()
    metrics.sync()
    assert steps(tmp_path) == [("train", 1)]
    metrics.close()
