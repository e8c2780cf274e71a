"""The learning rate's course: a pure function of the number of updates made so far."""

from __future__ import annotations

import math

from astropt_ds.config import ScheduleConfig


def lr_factor(update: int, schedule: ScheduleConfig) -> float:
    """What the peak learning rate is multiplied by at an update.

    Linear from zero over ``warmup`` updates, half a cosine down to ``floor`` at ``decay_until``,
    then constant (AstroPT, arXiv 2405.14930; the cosine is that of Loshchilov & Hutter 2017).

    Args:
        update: optimizer updates made before this one, from 0.
        schedule: warm-up, end of the decay and floor.

    Returns:
        A factor in [0, 1].
    """
    if update < schedule.warmup:
        return update / schedule.warmup
    if update >= schedule.decay_until:
        return schedule.floor
    done = (update - schedule.warmup) / (schedule.decay_until - schedule.warmup)
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * done))
