"""A function applied to many tasks, in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from astropt_ds.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def usable_cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], processes: int
) -> Iterator[Result]:
    """The results of a function, in the order of its tasks, computed in spawned processes.

    Args:
        function: of a module, so that another process finds it.
        tasks: small ones; their data are read where they are worked on.
        processes: 1 computes in this process.

    Raises:
        UserError: there is no process to compute in, or one was killed.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: 1 or more would be right")
    if processes == 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(
        min(processes, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_interrupts_to_the_parent,
    )
    try:
        yield from pool.map(function, tasks)
    except BrokenProcessPool:
        raise UserError(
            f"--processes {processes}: one of them was killed, for want of memory as a rule; "
            "fewer would be right"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
