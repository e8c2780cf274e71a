import json
import os
import struct
import subprocess
import sys

import pytest

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.training.metrics import Metrics, read_metrics
from tests.conftest import REPOSITORY

TENSORBOARD = load_config("1m", ["tensorboard=true"])
SOURCES = {"legacy": 0.25, "hsc": 0.75}


def fail_at_step_5(folder, config):
    first = Metrics(folder, 0, config)
    first.write("val", 0, loss=0.5)
    for step in range(1, 6):
        first.write("train", step, loss=float(step), mfu=None, drawn=SOURCES)
    first.write("event", 5, event="bad_sample", text="cut off")
    first.close(failed=True)


def resume_from_step_3(folder, config):
    second = Metrics(folder, 3, config)
    for step in range(4, 7):
        second.write("train", step, loss=10.0 + step, mfu=None, drawn=SOURCES)
    second.write("val", 6, loss=0.25)
    second.close()


# ---- Weights & Biases ------------------------------------------------------------------------

# In a process of its own: wandb leaves a service, threads and hooks behind.
SCRIPT = """
import sys
import time
from pathlib import Path

import psutil

from astropt_ds.config_source import load_config
from astropt_ds.training.metrics import Metrics
from tests.unit.training.test_trackers import fail_at_step_5, resume_from_step_3

folder = Path(sys.argv[1])
config = load_config("1m", ["wandb.mode=offline"])
fail_at_step_5(folder / "run", config)
time.sleep(1.1)  # wandb names its folders by the second
resume_from_step_3(folder / "run", config)
metrics = Metrics(folder / "orphan", 0, config)
metrics.write("train", 1, loss=1.0)
for service in psutil.Process().children(recursive=True):
    service.kill()
    service.wait()
for step in range(2, 10):
    metrics.write("train", step, loss=1.0)
metrics.close()
"""


@pytest.fixture(scope="module")
def wandb_runs(tmp_path_factory):
    """(folder of ``run``, resumed, and ``orphan``, whose service died; what was said on stderr)."""
    folder = tmp_path_factory.mktemp("wandb")
    for name in ("run", "orphan"):
        (folder / name).mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def wandb_records(path):
    """What an offline run holds: protocol buffers, framed as a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:  # a block's end holds no frame
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(record)
            record = b""


def parts(folder):
    """The records of each time that a run was started."""
    return [
        list(wandb_records(path)) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    ]


def history(records):
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            yield {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in items}


def test_a_resumed_run_continues_the_same_wandb_run_with_the_steps_it_makes_again(wandb_runs):
    found = parts(wandb_runs[0] / "run")
    assert len(found) == 2
    assert len({r.run.run_id for records in found for r in records if r.HasField("run")}) == 1
    first, second = (list(history(records)) for records in found)
    losses = [{r["step"]: r["train/loss"] for r in p if "train/loss" in r} for p in (first, second)]
    assert losses[0] == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}
    assert losses[1] == {4: 14.0, 5: 15.0, 6: 16.0}
    # wandb's own count, which may not go back, is left to it: online it goes on, offline anew
    assert [[r["_step"] for r in p] for p in (first, second)] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]]
    drawn = {name: value for name, value in first[1].items() if name.startswith("train/drawn")}
    assert drawn == {"train/drawn/legacy": 0.25, "train/drawn/hsc": 0.75}


def test_validation_and_training_share_the_axis_of_the_runs_steps_in_wandb(wandb_runs):
    for records, expected in zip(parts(wandb_runs[0] / "run"), [{0: 0.5}, {6: 0.25}], strict=True):
        found = {r["step"]: r["val/loss"] for r in history(records) if "val/loss" in r}
        assert found == expected
        metrics = [r.metric for r in records if r.HasField("metric")]
        assert [(m.glob_name, m.step_metric) for m in metrics] == [("*", "step")]


def test_wandb_is_told_whether_the_run_failed(wandb_runs):
    codes = [
        [r.exit.exit_code for r in records if r.HasField("exit")]
        for records in parts(wandb_runs[0] / "run")
    ]
    assert codes == [[1], [0]]


def test_a_run_outlives_wandb_and_says_so_once(wandb_runs):
    folder, said = wandb_runs
    assert [r["step"] for r in read_metrics(folder / "orphan")] == list(range(1, 10))
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: WeightsAndBiases is given up (")


# ---- TensorBoard -----------------------------------------------------------------------------


def scalars(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(e.step, e.value) for e in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_a_resumed_run_shows_each_step_once_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    fail_at_step_5(tmp_path, TENSORBOARD)
    resume_from_step_3(tmp_path, TENSORBOARD)
    found = scalars(tmp_path)
    losses = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0), (6, 16.0)]
    assert found.pop("train/loss") == losses
    assert found.pop("val/loss") == [(0, 0.5), (6, 0.25)]
    assert {tag: len(points) for tag, points in found.items()} == {
        "train/drawn/legacy": 6,
        "train/drawn/hsc": 6,
    }


def test_a_run_that_starts_over_hides_what_tensorboard_had(tmp_path):
    pytest.importorskip("tensorboard")
    for loss in (1.0, 2.0):
        metrics = Metrics(tmp_path, 0, TENSORBOARD)
        metrics.write("val", 0, loss=loss)
        metrics.write("train", 1, loss=loss)
        metrics.close()
    assert scalars(tmp_path) == {"val/loss": [(0, 2.0)], "train/loss": [(1, 2.0)]}


def test_a_killed_run_lacks_no_number_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    metrics = Metrics(tmp_path, 0, TENSORBOARD)
    for step in range(1, 4):
        metrics.write("train", step, **{f"number{i}": float(i) for i in range(40)})
    (file,) = (tmp_path / "tensorboard").iterdir()
    before = file.read_bytes()
    metrics.close()
    assert file.read_bytes() == before


def test_a_run_outlives_a_tensorboard_that_cannot_write(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where a folder has to be")
    metrics = Metrics(tmp_path, 0, TENSORBOARD)
    for step in range(1, 4):
        metrics.write("train", step, loss=1.0)
    metrics.close()
    assert len(read_metrics(tmp_path)) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: TensorBoard is given up (")


def test_tensorboard_without_its_package_is_one_line(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(UserError) as error:
        Metrics(tmp_path, 0, TENSORBOARD)
    assert str(error.value) == (
        "tensorboard=true needs tensorboard: pip install 'astropt-ds[tensorboard]' would be right"
    )
    assert not list(tmp_path.iterdir())
