"""What makes a node unfit, among others that are fit."""

import os
import subprocess
import sys

import pytest

from astropt_ds.config_source import load_config
from astropt_ds.training import node
from astropt_ds.training.node import Rank, read_rate
from astropt_ds.training.preflight import compare, compare_links
from tests.conftest import REPOSITORY, free_port

FIT = Rank("n0", "H100", 0.001, 1700, [], None, {"torch": "2.13"}, 1e9, 10**12)


def verdict(*changed, needed=10**9):
    """The lines on four nodes of two ranks, of which the last has these."""
    others = [FIT._replace(host=f"n{i}", read=read) for i in range(3) for read in (1e9, None)]
    return compare([*others, *changed], needed, "cuda")


def pair(**changes):
    host = {"host": "n3"} | changes
    return FIT._replace(**host), FIT._replace(**{**host, "read": None})


def test_equal_nodes_are_fit():
    lines, unfit = verdict(*pair())
    assert not unfit and len(lines) == 4 and all(line.endswith(": fit") for line in lines)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"compute_s": 0.002}, "takes 2.0 times as long as the others"),
        ({"compute_s": None, "faults": ["cannot compute: ECC"]}, "GPU 1: cannot compute: ECC"),
        ({"clock": 1200}, "GPU 0 runs at 1200 MHz, others at 1700"),
        ({"faults": ["3 uncorrected memory errors"]}, "GPU 0: 3 uncorrected memory errors"),
        ({"unreadable": "data: shards: not there"}, "UNFIT: data: shards: not there"),
        ({"device": "A100"}, "A100, where others have H100"),
        ({"versions": {"torch": "2.12"}}, "torch 2.12, where others have 2.13"),
        ({"read": 1e8}, "reads 10.0 times slower"),
        ({"free": 10**8}, "0.1 GB free, of 1.0 for checkpoints"),
    ],
)
def test_a_node_that_differs_is_named_with_the_reason(changes, words):
    lines, unfit = verdict(*pair(**changes))
    assert unfit == ["n3"] and words in lines[3] and "UNFIT" in lines[3]
    assert all(line.endswith(": fit") for line in lines[:3])


def test_shards_are_read_and_timed_if_there_is_enough_of_them(shards, monkeypatch):
    config = load_config("1m", [f"data.path={shards}"])
    assert read_rate(config, 3) is None
    monkeypatch.setattr(node, "LEAST_READ", 100_000)
    assert read_rate(config, 3) > 100_000


def test_a_node_that_lacks_a_device_is_named():
    lines, unfit = verdict(pair()[0])
    assert unfit == ["n3"] and "1 ranks, where others have 2" in lines[3]


def test_a_node_whose_own_links_are_slow_is_named():
    lines, slow = compare_links({"n0": 400e9, "n1": 100e9, "n2": 390e9})
    assert slow == ["n1"] and "390.00 GB/s" in lines[0] and "n1: UNFIT" in lines[1]
    assert compare_links({"n0": None, "n1": None}) == ([], [])


def test_ranks_that_do_not_come_end_the_wait_with_a_line(tmp_path):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "tools/preflight.py", "--timeout", "1", "--config", "1m", "run.dir=run"],
        cwd=REPOSITORY,
        env={**os.environ, **alone, "MASTER_PORT": str(free_port()), "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "1/2 clients joined" in done.stderr
    assert "does not reach the others" in done.stderr and "Traceback" not in done.stderr
