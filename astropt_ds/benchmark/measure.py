"""CPU seconds of work, and the medians of work done in turns.

Machines are shared and their clocks noisy: CPU seconds are counted rather than time, what is
compared is done in turns, and a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Mapping
from statistics import median, quantiles

import psutil

Work = Callable[[], float]  # does something and returns of how many images


def cpu_seconds(processes: Iterable[psutil.Process] = ()) -> float:
    """CPU seconds so far of this process, its ended children, and processes that still run."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    ended = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    times = (process.cpu_times() for process in processes)
    return ended + sum(time.user + time.system for time in times)


def in_turns(
    works: Mapping[str, Work], rounds: int, running: Mapping[str, list[psutil.Process]]
) -> dict[str, list[float]]:
    """CPU seconds an image of each work, for each round; a first round of all is not counted.

    Args:
        works: by name.
        rounds: that are counted.
        running: child processes that a work uses and that outlive it, by its name.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            before = cpu_seconds(running.get(name, ()))
            images = work()
            seconds = cpu_seconds(running.get(name, ())) - before
            if number:
                found[name].append(seconds / images)
    return found


def spread(times: list[float]) -> list[float]:
    """The quartiles around a median."""
    if len(times) < 2:
        return [times[0], times[0]]
    low, _, high = quantiles(times, n=4, method="inclusive")
    return [low, high]


def ratio(found: Mapping[str, list[float]], above: str, below: str) -> float:
    """The median over the rounds of one work's CPU seconds over another's."""
    pairs = zip(found[above], found[below], strict=True)
    return median(a / b for a, b in pairs)
