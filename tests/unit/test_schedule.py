import itertools
import math

import pytest

from astropt_ds.config import ScheduleConfig
from astropt_ds.schedule import lr_factor

PAPER = ScheduleConfig()


def test_the_papers_course():
    assert lr_factor(0, PAPER) == 0.0
    assert lr_factor(1, PAPER) == 1 / 2000
    assert lr_factor(2000, PAPER) == 1.0
    middle = (2000 + 29_700) // 2
    assert lr_factor(middle, PAPER) == pytest.approx(0.55)
    assert lr_factor(29_700, PAPER) == lr_factor(30_000, PAPER) == pytest.approx(0.1)


def test_it_rises_then_falls_without_a_jump():
    factors = [lr_factor(u, PAPER) for u in range(30_001)]
    rising, falling = factors[:2001], factors[2000:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    steepest = max(1 / 2000, 0.9 * math.pi / 2 / 27_700)
    assert max(abs(b - a) for a, b in itertools.pairwise(factors)) <= steepest * 1.0001


def test_no_warm_up_starts_at_the_peak():
    assert lr_factor(0, ScheduleConfig(warmup=0, decay_until=10, floor=0.0)) == 1.0
