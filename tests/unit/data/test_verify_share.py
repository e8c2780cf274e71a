"""Checks of a share, by several processes, from the command line."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from astropt_ds.data.shard_check import ShardTask, chosen
from astropt_ds.data.verify import verify
from astropt_ds.errors import UserError
from tests.conftest import REPOSITORY
from tests.unit.data.damage import SHARD, faults, flip, manifest_of, members


def task(folder, fraction, seed=0):
    entry = manifest_of(folder).splits["train"].shards[1]
    index = folder / "train.index.npy"
    return ShardTask(folder / SHARD, entry, index, 20, fraction, seed, None)


def test_a_share_reads_only_that_share(data):
    taken = chosen(task(data, 0.1))
    assert len(taken) == 2
    all_images = [member for member in members(data) if member.name.endswith(".jpg")]
    for number in set(range(20)) - set(taken.tolist()):
        flip(data / SHARD, all_images[number].offset_data + 9)
    report = verify(data, fraction=0.1)
    assert report.faults == []
    assert report.samples < 0.2 * report.listed
    assert report.bytes_read < 0.3 * verify(data).bytes_read
    flip(data / SHARD, all_images[taken[0]].offset_data + 9)
    assert [reason for _, _, reason in faults(data, fraction=0.1)] == [
        "its bytes do not match their crc32 in the index"
    ]


def test_the_smallest_share_has_a_sample_of_each_shard(data):
    report = verify(data, fraction=1e-9)
    assert report.samples == report.shards


def test_the_choice_depends_on_the_seed_alone(data):
    few, many = chosen(task(data, 0.3)), chosen(task(data, 0.6))
    assert set(few.tolist()) <= set(many.tolist()) and len(set(many.tolist())) == 12
    moved = replace(task(data, 0.3), path=data / "elsewhere.tar", first=0)
    assert np.array_equal(few, chosen(moved))
    assert not np.array_equal(few, chosen(task(data, 0.3, seed=1)))


def test_several_processes_find_what_one_does(data):
    for number, shard in enumerate(sorted(data.glob("*.tar"))):
        flip(shard, members(data, shard.name)[0].offset_data + 20 + number)
    assert verify(data, processes=2) == verify(data)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fraction": 0}, "--fraction 0: above 0, and 1 at most, would be right"),
        ({"fraction": 1.5}, "--fraction 1.5: above 0"),
        ({"split": "dev"}, "--split dev: .* holds train, val, test"),
        ({"processes": 0}, "--processes 0: 1 or more would be right"),
    ],
)
def test_options_that_do_not_fit_are_refused(data, options, message):
    with pytest.raises(UserError, match=message):
        verify(data, **options)


def test_the_command_line_tells_sound_from_damaged_from_no_data_set(data, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, REPOSITORY / "tools/verify_shards.py", "--processes", "1", *arguments],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        )

    sound = run(data, "--fraction", "0.5", "--seed", "3")
    assert sound.returncode == 0 and len(sound.stdout.splitlines()) == 1
    assert sound.stdout.startswith(f"{data}: no faults; checked ")
    (data / SHARD).unlink()
    damaged = run(data)
    assert damaged.returncode == 1
    first, last = damaged.stdout.splitlines()
    assert first == f"{data / SHARD}: missing; the manifest lists it"
    assert last.startswith(f"{data}: 1 faults; checked 130 of 150 samples")
    nothing = run(tmp_path)
    assert nothing.returncode == 2
    assert nothing.stderr.count("\n") == 1 and f"{tmp_path}: no manifest.json" in nothing.stderr
    mixed = run(data, "--val", "*")
    assert mixed.returncode == 2 and mixed.stderr == "error: --val: goes with --index\n"
