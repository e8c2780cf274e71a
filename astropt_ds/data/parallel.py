"""A function applied to many tasks by several processes, none of which outlives the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from astropt_ds.errors import UserError

AHEAD = 2  # tasks a process that are made before their results are asked for: tasks may be large

Task = TypeVar("Task")
Result = TypeVar("Result")


def usable_cpus() -> int:
    """The processors that this process may use: a node of a cluster has more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(
    function: Callable[[Task], Result], tasks: Iterable[Task], processes: int
) -> Generator[Result, None, None]:
    """The results of a function, in the order of its tasks, computed in spawned processes.

    Args:
        function: of a module, so that another process finds it.
        tasks: taken as processes become free.
        processes: 1 computes in this process.

    Raises:
        UserError: there is no process to compute in, or one was killed.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: 1 or more would be right")
    if processes == 1 or (isinstance(tasks, Sized) and len(tasks) < 2):
        yield from map(function, tasks)
        return
    # Children read these as they import NumPy: more threads than cores only get in the way.
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_watch_parent)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            with _interrupts_later():  # a process that is started here inherits that for good
                waiting.append(pool.submit(function, task))
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"--processes {processes}: one of them was killed, for want of memory as a rule; "
            "the same command again, with fewer if need be, would be right"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch_parent() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Left alone, it would wait for work for ever, or write into what the next command writes.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
