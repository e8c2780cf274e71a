import math
import random

import pytest

from astropt_ds.config_run import HealthConfig
from astropt_ds.training.health import Health


def after(values, **rules):
    """A judge that has seen good updates of these (loss, norm) values."""
    health = Health(HealthConfig(**rules))
    for loss, norm in values:
        health.made(loss, norm)
    return health


def noise(count, seed=0):
    rng = random.Random(seed)
    return [(rng.gauss(0.4, 0.01), rng.gauss(0.1, 0.02)) for _ in range(count)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_fault_from_the_first_step(value):
    health = after([], spike="ignore")
    assert health.fault(value, 0.1) == f"the loss is {value}"
    assert health.fault(0.4, value) == f"the gradient norm is {value}"


def test_six_sigma_above_the_window_is_a_spike_and_less_is_not():
    health = after(noise(128))
    assert health.fault(0.4 + 5 * 0.01, 0.1 + 5 * 0.02) is None
    assert "the loss is 0.48, 8" in health.fault(0.48, 0.1)
    assert "the gradient norm is 0.3," in health.fault(0.4, 0.3)
    assert health.fault(0.1, 0.01) is None  # down is where they are to go


def test_only_the_last_steps_count():
    long_ago = [(5.0, 5.0)] * 50
    assert after([*long_ago, *noise(100)]).fault(0.6, 0.1) is None  # the old ones widen the window
    assert after([*long_ago, *noise(128)]).fault(0.6, 0.1)


def test_no_verdict_before_half_a_window():
    assert after(noise(63)).fault(9.0, 9.0) is None
    assert after(noise(64)).fault(9.0, 9.0)


def test_a_loss_that_hardly_moves_has_no_spikes():
    assert after([(0.4, 0.1)] * 128).fault(0.4 + 1e-6, 0.1 + 1e-6) is None
    assert after([(0.4, 0.1)] * 128).fault(0.41, 0.1)


def test_rules_are_told_apart_by_what_is_wrong():
    health = after(noise(128))
    assert health.rule(math.nan, 0.1) == health.rule(0.4, math.inf) == "nonfinite"
    assert health.rule(9.0, 9.0) == "spike"
    assert after(noise(128), spike="ignore").fault(9.0, 9.0) is None


def test_a_resumed_judge_judges_alike():
    health = after(noise(200))
    health.skipped = 3
    again = Health(HealthConfig())
    again.restore(health.state())
    assert again.skipped == 3
    for loss in (0.45, 0.46, 0.47, 0.48, 0.5):
        assert again.fault(loss, 0.1) == health.fault(loss, 0.1)
