"""Ways to run the blocks and to partition: the same losses; and what travels between ranks."""

import json
from itertools import product

import pytest

from tests.distributed import compute_scenarios
from tests.distributed.compute_scenarios import FORGOTTEN, RECOMPUTE, TRAFFIC, WAYS

CASES = [
    *(("few", 1, *way) for way in WAYS["few"]),
    *(
        pytest.param("matrix", ranks, *way, marks=pytest.mark.slow)
        for ranks in (1, 2)
        for way in WAYS["matrix"]
    ),
]
every_case = pytest.mark.parametrize("what, ranks, precision, stage", CASES)


def launched(launch, folder, what, ranks):
    done = launch(ranks, compute_scenarios.__file__, folder, what, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / f"{what}-{ranks}.json").read_text())


@pytest.fixture(scope="module")
def matrix(launch, tmp_path_factory):
    found = {}

    def matrix(what, ranks):
        if (what, ranks) not in found:
            folder = tmp_path_factory.mktemp(what)
            found[what, ranks] = launched(launch, folder, what, ranks)
        return found[what, ranks]

    return matrix


@pytest.fixture(scope="module")
def traffic(launch, tmp_path_factory):
    return launched(launch, tmp_path_factory.mktemp("traffic"), "traffic", 2)


@every_case
def test_recomputation_changes_no_bit_of_a_training(matrix, what, ranks, precision, stage):
    found = matrix(what, ranks)
    expected = found[f"{precision} {stage} none eager"]["losses"]
    assert expected[3] < expected[1] and expected[2] < expected[0]  # of the same galaxies
    for recompute in RECOMPUTE:
        assert found[f"{precision} {stage} {recompute} eager"]["losses"] == expected


@every_case
def test_compiled_blocks_train_as_eager_ones_do(matrix, what, ranks, precision, stage):
    found = matrix(what, ranks)
    expected = found[f"{precision} {stage} none eager"]["losses"]
    # fused operations round bf16 less often
    tolerance = 1e-6 if precision == "fp32" else 1e-4
    for recompute in RECOMPUTE:
        losses = found[f"{precision} {stage} {recompute} compiled"]["losses"]
        assert losses == pytest.approx(expected, abs=tolerance)


@every_case
def test_a_compiled_training_is_one_graph_without_breaks(matrix, what, ranks, precision, stage):
    for recompute in RECOMPUTE:
        found = matrix(what, ranks)[f"{precision} {stage} {recompute} compiled"]
        assert (found["breaks"], found["graphs"]) == (0, 2)  # one to train, one to validate
        eager = matrix(what, ranks)[f"{precision} {stage} {recompute} eager"]
        assert eager["graphs"] == 0


@pytest.mark.parametrize("stage, accumulation", (*product(TRAFFIC, (1, 2)), *FORGOTTEN))
def test_as_many_bytes_travel_as_the_plan_says(traffic, stage, accumulation):
    for place, (planned, counted) in traffic["travels"][f"{stage} {accumulation}"].items():
        assert counted == pytest.approx(planned, rel=0.02), place


def test_copies_within_a_node_change_no_bit(traffic):
    straight = traffic["hierarchical"]["straight"]
    assert straight["3-hpz"] == straight["3"]


def test_a_resume_leaves_no_stale_copy_in_a_node(traffic):
    found = traffic["hierarchical"]
    expected = found["straight"]["3-hpz"][3:]
    assert found["resumed"]["3-hpz->3-hpz"] == expected


@pytest.mark.parametrize("change", ["3-hpz->1", "1->3-hpz"])
def test_runs_go_on_with_copies_within_nodes_and_without(traffic, change):
    found = traffic["hierarchical"]
    expected = found["straight"][change.partition("->")[0]][3:]
    assert found["resumed"][change] == pytest.approx(expected, abs=2e-6)
