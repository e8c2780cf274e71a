import os

import pytest
import torch

from astropt_ds.errors import UserError
from astropt_ds.training.ranks import even_nodes, start, threads


@pytest.mark.parametrize(
    "places, expected",
    [
        ([("a", range(8))], [8]),
        ([("a", range(8))] * 2, [4, 4]),  # as deepspeed and a plain srun leave them
        ([("a", range(6))] * 6, [1] * 6),
        ([("a", range(8))] * 2 + [("b", range(8))] * 2, [4] * 4),  # no matter how many nodes
        ([("a", range(4)), ("a", range(4, 8))], [4, 4]),  # bound to cores of their own
        ([("a", range(8)), ("a", range(8, 10)), ("a", range(8, 10))], [8, 1, 1]),
        ([("a", range(2))] * 3, [1, 1, 1]),  # more ranks than cores
    ],
)
def test_ranks_share_out_the_cores_that_they_may_all_use_and_keep_their_own(places, expected):
    places = [(host, set(cores)) for host, cores in places]
    assert [threads(places, rank) for rank in range(len(places))] == expected


@pytest.mark.parametrize("hosts, size", [("a", 1), ("aa", 2), ("aabb", 2), ("abc", 1)])
def test_weights_are_copied_among_the_ranks_of_a_node(hosts, size):
    assert even_nodes(list(hosts)) == size


@pytest.mark.parametrize("hosts", ["aab", "abab", "aabbb"])
def test_ranks_that_nodes_do_not_hold_in_order_and_evenly_are_refused(hosts):
    with pytest.raises(UserError, match="zero.hpz=true wants as many ranks on each node"):
        even_nodes(list(hosts))


@pytest.fixture
def restored():
    cores, count = os.sched_getaffinity(0), torch.get_num_threads()
    yield cores
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(count)


@pytest.mark.parametrize("named", [None, "3"])
def test_a_rank_uses_the_cores_that_it_is_bound_to_unless_the_user_says(
    restored, monkeypatch, named
):
    torch.set_num_threads(3)  # as torch does where the variable is set before it is imported
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if named:
        monkeypatch.setenv("OMP_NUM_THREADS", named)
    os.sched_setaffinity(0, {min(restored)})
    with start():
        assert torch.get_num_threads() == (3 if named else 1)
