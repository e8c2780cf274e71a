"""Several processes that write shards, none of which outlives the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from astropt_ds.errors import UserError
from astropt_ds.ingest.plan import Part
from astropt_ds.ingest.write import Writer


def write_all(writer: Writer, parts: Iterable[Part], processes: int) -> Generator[int, None, None]:
    """Write shards; yields the number of images of each as it is finished, in any order.

    Raises:
        UserError: a process was killed.
    """
    if processes == 1:
        yield from map(writer.write, parts)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start)
    waiting: set[Future[int]] = set()
    try:
        for part in parts:
            waiting.add(pool.submit(writer.write, part))
            if len(waiting) > 2 * processes:  # so that no more of the table is in memory twice
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise UserError(
            "a process was killed, for want of memory as a rule: the same command goes on from "
            f"the finished shards, with fewer than --processes {processes} if need be"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """In each process: leave an interrupt to the command, and end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Left alone, it would wait for work for ever, or write into what the next command writes.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
