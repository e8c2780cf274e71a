"""Bad updates at every ZeRO stage: skipped, or the end of the run, and never half made."""

import json

import pytest

from tests.distributed import health_scenarios
from tests.distributed.health_scenarios import ARRANGEMENTS, BEFORE, FAULTS

NAMES = [f"{stage}-{precision}" for stage, precision in ARRANGEMENTS]
REASONS = {
    "nan loss": "the loss is nan",
    "infinite gradient": "the gradient norm is inf",
    "overflowing norm": "the gradient norm is ",  # ZeRO-3 adds its squares in float64
    "loss spike": "the loss is ",
    "gradient spike": "the gradient norm is ",
}


@pytest.fixture(scope="module")
def results(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("health")
    done = launch(2, health_scenarios.__file__, folder, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "health.json").read_text())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_update_on_one_rank_is_skipped_on_all_and_moves_nothing(results, name, fault):
    found = results["skip"][name]["faults"][fault]
    assert found["skipped"].startswith(REASONS[fault])
    if "spike" in fault:
        assert "sigma above the" in found["skipped"]
    assert not found["moved"]
    assert found["updates"] == [BEFORE, BEFORE]  # the schedule's clock stands still
    assert found["in_a_row"] == FAULTS.index(fault) + 1


@pytest.mark.parametrize("name", NAMES)
def test_afterwards_the_run_goes_on_as_if_the_bad_batches_had_not_been(results, name):
    found = results["skip"][name]
    assert found["losses"] == found["undisturbed"]
    assert len(set(found["losses"])) == len(found["losses"])  # it does move


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_the_very_first_update_may_be_skipped(results, stage):
    assert results["first"][stage]["skipped"] == "the gradient norm is inf"
    assert results["first"][stage]["losses"] == results["skip"][f"{stage}-fp32"]["losses"][:3]


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
@pytest.mark.parametrize(
    "fault, message",
    [
        ("nan loss", "the loss is nan before update 1"),
        ("infinite gradient", "the gradient norm is inf before update 1"),
    ],
)
def test_under_the_rule_stop_all_ranks_end_and_nothing_moves(results, stage, fault, message):
    found = results["stop"][f"{stage} {fault}"]
    assert found == {"message": message, "moved": False, "updates": 0}
