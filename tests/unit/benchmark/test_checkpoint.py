import json

import pytest

from astropt_ds.benchmark import checkpoint
from astropt_ds.errors import UserError


def test_the_command_measures_saves_steps_and_loads_that_agree_with_each_other(launch, tmp_path):
    out, scratch = tmp_path / "saves.json", tmp_path / "scratch"
    scratch.mkdir()
    command = ("tools/benchmark.py", "checkpoint", "--config", "1m", "--rounds", "1")
    done = launch(1, *command, "--json", out, "--scratch", scratch, launcher="python")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(scratch.iterdir())
    _, (title, result) = json.loads(out.read_text()).items()  # the machine comes first
    assert title in done.stdout and "stall_over_save" in done.stdout
    seconds = result["seconds"]
    assert all(seconds[name] > 0 for name in seconds if name != checkpoint.LOST)
    assert seconds[checkpoint.STALL] < seconds[checkpoint.DURABLE]
    assert seconds[checkpoint.THEIRS] < seconds[checkpoint.THEIRS_SYNCED]
    # of a single round the medians are the values themselves
    ratio = seconds[checkpoint.STALL] / seconds[checkpoint.SAVE]
    assert result["stall_over_save"] == pytest.approx(ratio)
    # weights and two moments in fp32, once each, and little else: in both layouts
    state = 12 * result["parameters"] / 1e9
    assert result["gigabytes"]["ours"] == pytest.approx(state, rel=0.02)
    assert result["gigabytes"]["deepspeed's"] == pytest.approx(state, rel=0.02)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--config", "none"), "--config none: no such preset; one of 1m "),
        (("--ranks", "0"), "--ranks 0: 1 or more would be right"),
        (("--scratch", "nowhere"), "--scratch nowhere: is no folder"),
    ],
)
def test_bad_options_are_one_line(launch, options, message):
    done = launch(1, "tools/benchmark.py", "checkpoint", *options, launcher="python")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")


def test_a_model_without_room_on_the_disk_is_refused_before_anything_starts(tmp_path):
    config = tmp_path / "vast.yaml"
    config.write_text("model: {layers: 10000, heads: 64, width: 65536}")  # 8 petabytes
    with pytest.raises(UserError, match=r"vast\.yaml: needs [0-9.]+ GB of disk in .*; .* are free"):
        checkpoint.measure_checkpoint(str(config), 2, 1, tmp_path)
