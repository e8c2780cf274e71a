"""What makes a node unfit, among others that are fit."""

import pytest

from astropt_ds.config_source import load_config
from astropt_ds.training import preflight
from astropt_ds.training.preflight import Rank, compare, read_rate

FIT = Rank("n0", "H100", 0.001, [], {"torch": "2.13"}, 1e9, 10**12)


def verdict(*changed, needed=10**9):
    """The lines on four nodes of two ranks, of which the last has these."""
    others = [FIT._replace(host=f"n{i}", read=read) for i in range(3) for read in (1e9, None)]
    return compare([*others, *changed], needed, "cuda")


def pair(**changes):
    host = {"host": "n3"} | changes
    return FIT._replace(**host), FIT._replace(**{**host, "read": None})


def test_equal_nodes_are_fit():
    lines, fit = verdict(*pair())
    assert fit and len(lines) == 4 and all(line.endswith(": fit") for line in lines)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"compute_s": 0.002}, "takes 2.0 times as long as the others"),
        ({"faults": ["3 uncorrected memory errors"]}, "GPU 0: 3 uncorrected memory errors"),
        ({"device": "A100"}, "A100, where others have H100"),
        ({"versions": {"torch": "2.12"}}, "torch 2.12, where others have 2.13"),
        ({"read": 1e8}, "reads 10.0 times slower"),
        ({"free": 10**8}, "0.1 GB free, of 1.0 for checkpoints"),
    ],
)
def test_a_node_that_differs_is_named_with_the_reason(changes, words):
    lines, fit = verdict(*pair(**changes))
    assert not fit and words in lines[3] and "UNFIT" in lines[3]
    assert all(line.endswith(": fit") for line in lines[:3])
    assert lines[4] == "leave out: --exclude=n3"


def test_shards_are_read_and_timed_if_there_is_enough_of_them(shards, monkeypatch):
    config = load_config("1m", [f"data.path={shards}"])
    assert read_rate(config, 3) is None
    monkeypatch.setattr(preflight, "LEAST_READ", 100_000)
    assert read_rate(config, 3) > 100_000


def test_a_node_that_lacks_a_device_is_named():
    lines, fit = verdict(pair()[0])
    assert not fit and "1 ranks, where others have 2" in lines[3]
