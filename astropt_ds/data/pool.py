"""Processes that fill slots of shared memory, in order; no image goes through a pipe.

The memory is mapped before the processes are forked, so it needs no name and no /dev/shm, and it
is gone when they are. Forking among other threads (gloo's, a progress bar's) can leave a child
waiting for a lock that its owner will never give back: a pool is made before there are any.
"""

from __future__ import annotations

import gc
import itertools
import mmap
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from astropt_ds.errors import UserError

PREFETCH = 2  # slots that a worker keeps ready

Work = Callable[[str, Any, memoryview], Any]


@dataclass(frozen=True)
class Failure:
    """The reply in place of a result that cannot be had; the message is one line."""

    message: str


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    replies: dict[tuple[str, int], Any] = field(default_factory=dict)
    alive: bool = True


class Pool:
    """Worker processes with their slots.

    Args:
        work: ``work(stream, item, slot)`` fills the slot and returns something small to pickle.
            What it raises becomes a :class:`Failure`.
        workers: processes; 0 works in this one.
        streams: names of the sequences of items that are worked on independently.
        capacity: bytes of a slot. Memory that is never written costs nothing.
    """

    def __init__(self, work: Work, workers: int, streams: Iterable[str], capacity: int) -> None:
        self._work = work
        self._capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        # one more than the workers fill: the consumer holds it
        self._slots = workers * PREFETCH + 1
        self._memory = {
            stream: memoryview(mmap.mmap(-1, self._slots * self._capacity)) for stream in streams
        }
        self._running: dict[str, Iterator[tuple[memoryview, Any]]] = {}
        self._workers: list[_Worker] = []
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in range(workers)]
        # A child must not collect what its parent left uncollected: it would run the parent's
        # finalizers, on the parent's pipes. Untouched pages stay shared, besides.
        gc.freeze()
        for number in range(workers):
            process = context.Process(target=self._serve, args=(pipes, number), daemon=True)
            process.start()
            self._workers.append(_Worker(process, pipes[number][0]))
        gc.unfreeze()
        for _, far_end in pipes:
            far_end.close()
        # also when nobody calls close: at the interpreter's exit multiprocessing would send them
        # SIGTERM, which they ignore, and wait
        processes = [worker.process for worker in self._workers]
        self._end = Finalize(self, _kill, (processes,), exitpriority=0)

    def close(self) -> None:
        """End the processes, whatever they are at: they hold nothing that must be saved."""
        self._end()
        for worker in self._workers:
            worker.alive = False

    def slots(self, stream: str) -> list[memoryview]:
        """The memory of each slot of a stream."""
        return [self._slot(stream, number) for number in range(self._slots)]

    def run(self, stream: str, items: Iterable[Any]) -> Iterator[tuple[memoryview, Any]]:
        """(slot, reply) of each item, in order. A slot is valid until the next one is asked for.

        A new run of a stream ends the one before.
        """
        if stream in self._running:
            self._running.pop(stream).close()  # type: ignore[attr-defined]
        results = self._run(stream, items) if self._workers else self._run_here(stream, items)
        self._running[stream] = results
        return results

    def _run(self, stream: str, items: Iterable[Any]) -> Iterator[tuple[memoryview, Any]]:
        free = deque(range(self._slots))
        pending: deque[tuple[_Worker, int]] = deque()
        coming = zip(items, itertools.cycle(self._workers), strict=False)
        try:
            while True:
                while free and (task := next(coming, None)):
                    item, worker = task
                    slot = free.popleft()
                    pending.append((worker, slot))
                    self._send(worker, (stream, slot, item))
                if not pending:
                    return
                worker, slot = pending.popleft()
                yield self._slot(stream, slot), self._receive(worker, stream, slot)
                free.append(slot)
        finally:
            for worker, slot in pending:  # or they would write into slots given out anew
                self._receive(worker, stream, slot)

    def _run_here(self, stream: str, items: Iterable[Any]) -> Iterator[tuple[memoryview, Any]]:
        for item in items:
            slot = self._slot(stream, 0)
            yield slot, self._try(stream, item, slot)

    def _send(self, worker: _Worker, message: tuple[str, int, Any]) -> None:
        try:
            worker.connection.send(message)
        except OSError:
            worker.alive = False

    def _receive(self, worker: _Worker, stream: str, slot: int) -> Any:
        while (stream, slot) not in worker.replies:
            if not worker.alive:
                return Failure(_obituary(worker.process))
            ready = wait([worker.connection, worker.process.sentinel])
            if worker.connection in ready:
                try:
                    of, number, reply = worker.connection.recv()
                    worker.replies[of, number] = reply
                except (EOFError, OSError):
                    worker.alive = False
            else:
                worker.alive = False
        return worker.replies.pop((stream, slot))

    def _slot(self, stream: str, number: int) -> memoryview:
        return self._memory[stream][number * self._capacity : (number + 1) * self._capacity]

    # In the worker.

    def _serve(self, pipes: list[tuple[Connection, Connection]], number: int) -> None:
        # Ctrl-C and schedulers signal all processes of a run: what it means is the run's to decide
        for meant_for_all in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(meant_for_all, signal.SIG_IGN)
        for other, (near_end, far_end) in enumerate(pipes):
            near_end.close()  # held open here, it would outlive the run
            if other != number:
                far_end.close()
        connection = pipes[number][1]
        try:
            while True:
                stream, slot, item = connection.recv()
                reply = self._try(stream, item, self._slot(stream, slot))
                connection.send((stream, slot, reply))
        except (EOFError, OSError):
            pass  # the run has ended
        finally:
            os._exit(0)  # nothing of the run's own is to be torn down here

    def _try(self, stream: str, item: Any, slot: memoryview) -> Any:
        try:
            return self._work(stream, item, slot)
        except UserError as error:
            return Failure(str(error))
        except Exception as error:  # ours, not the user's: shown in full here, told in short there
            traceback.print_exc(file=sys.stderr)
            return Failure(f"reading failed unexpectedly: {error!r}")


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _obituary(process: BaseProcess) -> str:
    process.join(timeout=10)
    code = process.exitcode
    how = f"killed by signal {-code}" if code is not None and code < 0 else f"gone (exit {code})"
    return (
        f"reading process {process.pid} was {how}; where memory ran out, fewer workers help: "
        "the same command goes on from what is saved"
    )
