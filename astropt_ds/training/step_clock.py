"""Where the time of a step goes, on request: data, forward, backward, optimizer, communication."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch

# What DeepSpeed's backend has of them, whether or not this version trains with it.
COLLECTIVES = (
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object"),
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor"),
    *("broadcast", "broadcast_object_list", "gather", "scatter", "barrier", "monitored_barrier"),
    *("all_to_all", "all_to_all_single"),
)
PARTS = ("data", "forward", "backward", "optimizer", "communication")


class Clock(Protocol):
    """Counts the seconds of a step's parts, or does not."""

    def __call__(self, part: str) -> AbstractContextManager[None]:
        """What is done in this block belongs to that part."""

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last call; nothing, where they are not counted."""


class NoClock:
    """The clock of a run that does not want to know."""

    def __call__(self, part: str) -> AbstractContextManager[None]:
        """Cost nothing."""
        return nullcontext()

    def take(self) -> dict[str, float]:
        """Nothing."""
        return {}


class StepClock:
    """Counts each second of a step once: for the innermost part that is open.

    The collectives of a forward pass are therefore communication, and no part of it. On a CPU they
    count as long as they hold up this process: in the call, and in the wait for its end. On a GPU
    each border between parts waits until the device is idle, since kernels run long after their
    launch: the parts are true, but nothing overlaps any more, and the step takes longer.

    Args:
        device: what the step computes on.
        backend: of DeepSpeed; its collectives are counted from now on, within other parts.
    """

    def __init__(self, device: torch.device, backend: Any) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[str] = []  # innermost last
        self._last = 0.0  # border
        for name in filter(partial(hasattr, backend), COLLECTIVES):
            setattr(backend, name, self._counted(getattr(backend, name)))

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """What is done in this block belongs to that part."""
        self._border()
        self._open.append(part)
        try:
            yield
        finally:
            self._border()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last call."""
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def communicate(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call it, as communication; but a validation's, say, is no part of a step."""
        with self("communication") if self._open else nullcontext():
            return call(*args, **kwargs)

    def _border(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        now = time.monotonic()
        if self._open:
            self._seconds[self._open[-1]] += now - self._last
        self._last = now

    def _counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            work = self.communicate(collective, *args, **kwargs)
            return _Handle(work, self) if hasattr(work, "wait") else work

        return counted


class _Handle:
    """A collective under way, whose end is waited for elsewhere."""

    def __init__(self, work: Any, clock: StepClock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        return self._clock.communicate(self._work.wait, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def split(parts: dict[str, float], step: float, waited: float) -> dict[str, float]:
    """The fields of a step's record, which add up to the step.

    Args:
        parts: seconds of each, as :meth:`StepClock.take` returns them.
        step: seconds of all.
        waited: seconds of it, outside the parts, until its data were there.
    """
    fields = {f"{part}_s": seconds for part, seconds in parts.items()}
    fields["data_s"] += waited
    return fields | {"other_s": step - sum(fields.values())}
