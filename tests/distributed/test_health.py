"""Bad updates at every ZeRO stage: skipped, or the end of the run, and never half made."""

import json

import pytest

from tests.distributed import disturbed_train, health_scenarios
from tests.distributed.health_scenarios import ARRANGEMENTS, BEFORE, FAULTS
from tests.distributed.runs import alone, events, records, train

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


# ---- what the command makes of them ----------------------------------------------------------


def test_a_skipped_update_is_on_record_and_the_run_goes_on(launch, tiny, tmp_path):
    run = tmp_path / "run"
    script = (disturbed_train.__file__, "spoilt_once")
    done = train(launch, tiny, run, 2, "run.steps=6", "zero.stage=3", script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r["skipped"] for r in records(run)] == [0, 0, 0, 1, 0, 0]
    assert [r["updates"] for r in records(run)] == [1, 2, 3, 3, 4, 5]
    assert [r["loss"] is None for r in records(run)] == [r["skipped"] == 1 for r in records(run)]
    assert records(run)[4]["lr"] == records(run)[3]["lr"]  # the schedule has waited
    (event,) = events(run, "skipped")
    assert event["text"] == "warning: update 4 skipped at step 4: the loss is nan"


@pytest.mark.parametrize(
    "rule, made, message",
    [
        ("health.max_skipped=3", 6, "step 6: 3 updates in a row were skipped, as many as health."),
        ("health.nonfinite=stop", 4, "step 4: the loss is nan; health.nonfinite=stop"),
    ],
)
def test_too_many_in_a_row_or_the_rule_stop_end_the_run(
    launch, tiny, tmp_path, rule, made, message
):
    run = tmp_path / "run"
    script = (disturbed_train.__file__, "spoilt")
    done = alone(launch, tiny, run, "run.steps=20", rule, script=script)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert [r["step"] for r in records(run)] == list(range(1, made + 1))
    assert [e["step"] for e in events(run, "skipped")] == list(range(4, made + 1))
    assert events(run, "failed")[0]["text"].startswith(message)
    assert not (run / "complete").exists()
