import gc

import pytest
import torch

from astropt_ds.training.pace import GarbagePauses, Pace, Place, stragglers
from astropt_ds.training.ranks import start


def places(*changes):
    """Four ranks at the same pace, but for the changes."""
    usual = Place("", 1.0, data_wait_s=0.01, gc_pause_s=0.0, compute_s=0.1, memory_bytes=1)
    found = [usual._replace(host=f"node{n}") for n in range(4)]
    for rank, values in changes:
        found[rank] = found[rank]._replace(**values)
    return found


def test_ranks_at_the_same_pace_are_not_named():
    assert stragglers(places(), places()) == []
    usual = places((1, {"compute_s": 0.14}), (2, {"data_wait_s": 0.2}))
    assert stragglers(usual, usual) == []


def test_a_slow_device_is_named_with_its_host():
    slow = places((2, {"compute_s": 0.2}))
    (line,) = stragglers(slow, slow)
    assert line == "straggler: rank 2 on node2 computes 2.0 times slower than others"


def test_a_rank_that_waits_for_data_is_named():
    (line,) = stragglers(places((3, {"data_wait_s": 0.5})), [])
    assert line == "straggler: rank 3 on node3 waits 0.500 s a step for data, others 0.010 s"


def test_of_two_ranks_the_slow_one_is_named():
    two = places((1, {"compute_s": 0.2}))[:2]
    assert len(stragglers(two, two)) == 1


def test_a_rank_that_was_disturbed_once_is_not_named():
    once, other = places((1, {"compute_s": 0.2})), places((2, {"compute_s": 0.2}))
    assert stragglers(once, places()) == stragglers(once, other) == stragglers(once, []) == []


def test_the_pace_is_the_mean_since_the_last_comparison():
    with start() as ranks:
        pace = Pace(ranks)
        for steps in ([(1.0, 0.1, 0.2), (3.0, 0.3, 0.2)], [(5.0, 0.0, 0.1)]):
            for step in steps:
                pace.add(*step)
            (place,) = pace.compare()
        assert (place.step_s, place.data_wait_s, place.gc_pause_s) == (5.0, 0.0, 0.1)
        assert 0 < place.compute_s < 5
        assert place.host


@pytest.fixture
def pauses():
    found = GarbagePauses()
    yield found
    found.close()


def test_pauses_of_the_garbage_collector_are_counted_once(pauses):
    pauses.take()
    keep = [[torch.zeros(1)] for _ in range(1000)]
    gc.collect()
    assert 0 < pauses.take() < 60
    assert pauses.take() == 0.0
    del keep
