import json

import pytest

from astropt_ds.benchmark import conversion


def test_the_command_converts_what_the_ranks_saved_in_every_way(launch, tmp_path):
    out, scratch = tmp_path / "conversions.json", tmp_path / "scratch"
    scratch.mkdir()
    command = ("tools/benchmark.py", "convert", "--config", "1m", "--rounds", "1", "--ranks", "1")
    done = launch(1, *command, "--json", out, "--scratch", scratch, launcher="python")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(scratch.iterdir())
    _, (title, result) = json.loads(out.read_text()).items()  # the machine comes first
    assert title in done.stdout and "cpu_over_deepspeeds" in done.stdout
    assert result["parameters"] == 1_198_592
    ways = {*result["cpu_seconds"]}
    assert ways == {conversion.IDLE, conversion.OURS, conversion.TO_FILE} | {
        conversion.THEIRS,
        conversion.SCRIPT,
    }
    assert all(result["seconds"][way] > 0 for way in ways)
    # of a single round the medians are the values themselves
    cpu = result["cpu_seconds"]
    ratio = cpu[conversion.THEIRS] / cpu[conversion.SCRIPT]
    assert result["cpu_over_deepspeeds"] == pytest.approx(ratio)


def test_a_conversion_that_fails_is_no_measurement(tmp_path):
    command = ["/bin/sh", "-c", "echo what went wrong; exit 3"]
    with pytest.raises(RuntimeError, match="failed: what went wrong"):
        conversion._run(command, tmp_path / "printed")
