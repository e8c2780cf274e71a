"""How fast each rank is: a straggler holds up all the others, and is named."""

from __future__ import annotations

import gc
import socket
import statistics
import time
from typing import Any, NamedTuple

import torch

from astropt_ds.training.ranks import Ranks

SLOW = 1.5  # times the median's time for the same work
WAITING = 0.2  # of a step, more than the median waits for data
TRIALS = 30


class Place(NamedTuple):
    """A rank's pace.

    Attributes:
        host: where it is.
        step_s: seconds that a step takes.
        data_wait_s: seconds of it that it waits for its data.
        gc_pause_s: seconds of it that Python's garbage collector holds it up.
        compute_s: seconds that a fixed computation takes.
        memory_bytes: at its peak.
    """

    host: str
    step_s: float
    data_wait_s: float
    gc_pause_s: float
    compute_s: float
    memory_bytes: int


class Pace:
    """Compares the ranks now and then.

    A step takes as long on all ranks, since they wait for each other in it. What tells them apart
    is what each does alone: waiting for its data, and a matrix product that is timed for this.

    Args:
        ranks: the run's processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        side = 4096 if ranks.device.type == "cuda" else 512
        self._matrix = torch.ones(side, side, device=ranks.device)
        self._steps: list[tuple[float, float, float]] = []

    def add(self, seconds: float, data_wait: float, gc_pause: float) -> None:
        """Note a step."""
        self._steps.append((seconds, data_wait, gc_pause))

    def compare(self) -> list[Place]:
        """The pace of every rank since the last comparison. Collective."""
        step, wait, pause = map(statistics.fmean, zip(*self._steps, strict=True))
        self._steps.clear()
        own = self.compute_s(), self.ranks.peak_memory()
        return self.ranks.gather(Place(socket.gethostname(), step, wait, pause, *own))

    def compute_s(self) -> float:
        """Seconds that a fixed matrix product takes on this rank's device."""
        return statistics.fmean(self._timed_product() for _ in range(TRIALS))

    def _timed_product(self) -> float:
        cuda = self.ranks.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self._matrix @ self._matrix
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def slow_ranks(places: list[Place]) -> set[int]:
    """The ranks that compute slowly, in one comparison."""
    if not places:
        return set()
    compute = statistics.median_low(place.compute_s for place in places)
    return {rank for rank, place in enumerate(places) if place.compute_s > SLOW * compute}


def stragglers(places: list[Place], before: list[Place]) -> list[str]:
    """A line on each rank that holds up the others.

    Args:
        places: of all ranks.
        before: of the comparison before. A rank that computes slowly once may just have been
            disturbed; one that does so twice is named.
    """
    slow = slow_ranks(places) & slow_ranks(before)
    compute = statistics.median_low(place.compute_s for place in places)
    wait = statistics.median_low(place.data_wait_s for place in places)
    found = []
    for rank, place in enumerate(places):
        name = f"straggler: rank {rank} on {place.host}"
        if rank in slow:
            found.append(
                f"{name} computes {place.compute_s / compute:.1f} times slower than others"
            )
        if place.data_wait_s > wait + WAITING * place.step_s:
            found.append(
                f"{name} waits {place.data_wait_s:.3f} s a step for data, others {wait:.3f} s"
            )
    return found


class GarbagePauses:
    """Seconds that Python's garbage collector has stopped this process for."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._start = 0.0
        gc.callbacks.append(self._callback)

    def take(self) -> float:
        """Those since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Measure no longer."""
        gc.callbacks.remove(self._callback)

    def _callback(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._start = time.perf_counter()
        else:
            self._seconds += time.perf_counter() - self._start
