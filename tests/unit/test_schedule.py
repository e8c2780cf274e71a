import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astropt_ds.config import ScheduleConfig
from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.schedule import first_change, lr_factor

PAPER = ScheduleConfig()
KINDS = ("cosine", "wsd", "linear", "constant")


@st.composite
def schedules(draw, kinds=KINDS, highest_floor=1.0):
    """Schedules of any kind whose decay takes an update at least."""
    kind = draw(st.sampled_from(kinds))
    warmup = draw(st.integers(0, 60))
    until = draw(st.integers(warmup + 1, 200))
    start = draw(st.integers(warmup, until - 1)) if kind == "wsd" else None
    floor = draw(st.floats(0, highest_floor))
    return ScheduleConfig(
        kind=kind, warmup=warmup, decay_until=until, decay_from=start, floor=floor
    )


def course(schedule, updates=250):
    return [lr_factor(u, schedule) for u in range(updates)]


def test_the_papers_course_to_the_last_bit():
    assert lr_factor(0, PAPER) == 0.0
    assert lr_factor(1, PAPER) == 1 / 2000
    assert lr_factor((2000 + 29_700) // 2, PAPER) == pytest.approx(0.55)
    assert lr_factor(29_700, PAPER) == lr_factor(30_000, PAPER) == 0.1
    for update in range(2000, 29_700):
        done = (update - 2000) / 27_700
        assert lr_factor(update, PAPER) == 0.1 + (1 - 0.1) * 0.5 * (1 + math.cos(math.pi * done))


@given(schedules())
def test_every_course_rises_to_the_peak_and_never_again(schedule):
    factors = course(schedule)
    rising, falling = factors[: schedule.warmup + 1], factors[schedule.warmup :]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert min(factors) >= 0 and max(factors) == lr_factor(schedule.warmup, schedule) == 1.0
    assert schedule.warmup == 0 or factors[0] == 0.0


@given(schedules())
def test_no_step_is_larger_than_the_steepest_slope(schedule):
    length = schedule.decay_until - schedule.decay_starts
    slope = {
        "cosine": math.pi / 2 / length,
        "linear": 1 / length,
        "wsd": 1 / math.sqrt(length),  # its first step
        "constant": 0.0,
    }[schedule.kind]
    steepest = max(1 / max(schedule.warmup, 1), (1 - schedule.floor) * slope)
    steps = (abs(b - a) for a, b in itertools.pairwise(course(schedule)))
    assert max(steps) <= steepest + 1e-12


@given(schedules())
def test_it_ends_at_the_floor_for_good_unless_it_is_constant(schedule):
    end = 1.0 if schedule.kind == "constant" else schedule.floor
    assert set(course(schedule)[schedule.decay_until :]) == {end}


@given(schedules(highest_floor=0.9))
def test_the_decay_starts_where_the_configuration_says(schedule):
    held = course(schedule)[schedule.warmup : schedule.decay_starts + 1]
    assert set(held) == {1.0}
    after = lr_factor(schedule.decay_starts + 1, schedule)
    assert after == 1.0 if schedule.kind == "constant" else after < 1.0


@pytest.mark.parametrize(
    "kind, decay_from, factors",
    [
        ("linear", None, {50: 0.5, 100: 1.0, 325: 0.8, 550: 0.6, 775: 0.4, 1000: 0.2}),
        ("wsd", 600, {50: 0.5, 100: 1.0, 600: 1.0, 636: 0.76, 700: 0.6, 856: 0.36, 1000: 0.2}),
        ("wsd", None, {100: 1.0, 800: 1.0, 850: 0.6, 1000: 0.2}),  # in the last fifth
        ("wsd", 1000, {999: 1.0, 1000: 0.2}),
        ("constant", None, {50: 0.5, 100: 1.0, 1000: 1.0, 10**9: 1.0}),
    ],
)
def test_values_that_can_be_worked_out_by_hand(kind, decay_from, factors):
    schedule = ScheduleConfig(
        kind=kind, warmup=100, decay_until=1000, decay_from=decay_from, floor=0.2
    )
    assert {u: lr_factor(u, schedule) for u in factors} == pytest.approx(factors, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_warm_up_starts_at_the_peak(kind):
    assert lr_factor(0, ScheduleConfig(kind=kind, warmup=0, decay_until=10, floor=0.0)) == 1.0


@given(schedules(kinds=["wsd"], highest_floor=0.9), st.integers(1, 50), st.integers(1, 50))
def test_wsd_extended_keeps_every_factor_until_its_decay_would_have_begun(before, later, longer):
    start = before.decay_starts + later
    now = before.model_copy(update={"decay_from": start, "decay_until": start + longer})
    kept = before.decay_starts + 1
    assert course(now, kept) == course(before, kept)
    assert first_change(before, now, before.decay_starts) is None
    assert first_change(before, now, 250) == kept


@given(schedules(), schedules(), st.integers(0, 250))
def test_the_first_change_is_the_first_difference_up_to_the_next_update(before, now, updates):
    pairs = list(zip(course(before, updates + 1), course(now, updates + 1), strict=True))
    change = first_change(before, now, updates)
    if change is None:
        assert all(a == b for a, b in pairs)
    else:
        assert pairs[change][0] != pairs[change][1]
        assert all(a == b for a, b in pairs[:change])


def test_the_update_that_comes_next_counts_as_changed():
    longer = PAPER.model_copy(update={"decay_until": 60_000})
    assert first_change(PAPER, longer, 2000) is None
    assert first_change(PAPER, longer, 2001) == 2001
    assert first_change(PAPER, longer, 20_000) == 2001


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["kind=step"], "schedule.kind=step should be 'cosine', 'wsd', 'linear' or 'constant'"),
        (["decay_from=9"], "schedule: decay_from=9 needs kind=wsd, not kind=cosine"),
        (["kind=linear", "decay_from=9000"], "decay_from=9000 needs kind=wsd, not kind=linear"),
        (["kind=constant", "decay_from=9"], "decay_from=9 needs kind=wsd, not kind=constant"),
        (
            ["kind=wsd", "decay_from=1999"],
            "schedule: decay_from=1999 lies outside warmup=2000 to decay_until=29700",
        ),
        (["kind=wsd", "decay_from=29701"], "decay_from=29701 lies outside warmup=2000 to"),
        (["kind=wsd", "decay_until=2400"], "decay_from=1920 lies outside warmup=2000 to"),
        (["kind=wsd", "warmup=30000"], "warmup=30000 ends after decay_until=29700"),
    ],
)
def test_a_schedule_that_does_not_fit_is_one_line(overrides, message):
    with pytest.raises(UserError) as error:
        load_config("1m", [f"schedule.{override}" for override in overrides])
    assert message in str(error.value) and "\n" not in str(error.value)
