"""The learning rate's course: a pure function of the number of updates made so far."""

from __future__ import annotations

import math

from astropt_ds.config import ScheduleConfig


def lr_factor(update: int, schedule: ScheduleConfig) -> float:
    """What the peak learning rate is multiplied by at an update.

    Linear from zero over ``warmup`` updates, then by ``kind`` down to ``floor`` at
    ``decay_until`` and constant:

    - ``cosine``: half a cosine (Loshchilov & Hutter 2017), as AstroPT has it (arXiv 2405.14930);
    - ``linear``: a straight line;
    - ``wsd``: at the peak until ``decay_starts`` (warm-up, stable, decay; Hu et al. 2024, arXiv
      2404.06395), then as 1 - sqrt(x) (Haegele et al. 2024, arXiv 2405.18392, Section 3);
    - ``constant``: at the peak for good.

    Args:
        update: optimizer updates made before this one, from 0.
        schedule: kind, warm-up, decay and floor.

    Returns:
        A factor in [0, 1].
    """
    if update < schedule.warmup:
        return update / schedule.warmup
    if schedule.kind == "constant":
        return 1.0
    if update >= schedule.decay_until:
        return schedule.floor
    if update < schedule.decay_starts:
        return 1.0
    done = (update - schedule.decay_starts) / (schedule.decay_until - schedule.decay_starts)
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "wsd": 1 - math.sqrt(done),
    }[schedule.kind]
    return schedule.floor + (1 - schedule.floor) * left


def first_change(before: ScheduleConfig, now: ScheduleConfig, updates: int) -> int | None:
    """Where a run that has changed its schedule would have gone another way.

    A schedule that keeps the past, as ``wsd`` does that is extended before its decay starts,
    leaves a resumed run as if it had had that schedule from the start.

    Args:
        before: the schedule so far.
        now: the schedule from here on.
        updates: optimizer updates made; the next one counts too.

    Returns:
        The first update at which the factors differ, or None if the course is the same.
    """
    course = range(updates + 1)
    return next((u for u in course if lr_factor(u, before) != lr_factor(u, now)), None)
