"""Saving beside the training: a copy in host memory, which a thread writes while the run goes on.

DeepSpeed's own checkpoint engines serve its own layout, which is tied to the number of ranks and to
the stage; the layout here is written directly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from astropt_ds.errors import UserError, say
from astropt_ds.training.fragments import Fragment
from astropt_ds.training.ranks import Ranks

# Writes this rank's part of what is saved; called on all ranks, with a line of their own.
Write = Callable[[list[Fragment], Ranks], Path]


@dataclass(frozen=True)
class Saved:
    """How a save ended; the same on all ranks but for ``durable``.

    Attributes:
        kind: what was saved.
        step: batches consumed then.
        stall: seconds that the training stood still for it, on the slowest rank.
        durable: seconds from its start until all was on the disk.
        path: where it is, if it is.
        problem: why it is not.
    """

    kind: str
    step: int
    stall: float
    durable: float = 0.0
    path: Path | None = None
    problem: str | None = None


class Saver:
    """One save in flight at most; the next one waits for it.

    All methods but `reserve` and `finished` are collective.

    Args:
        ranks: the run's processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._line = ranks.apart()
        self._cuda = ranks.device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "saver")
        self._writing: Future[list[Saved]] | None = None
        self._buffer = self._thread.submit(_fresh_memory, 0, self._cuda)

    def reserve(self, fragments: list[Fragment]) -> None:
        """Make room for copies of what this rank owns, beside the training: the first save too
        is then no slower than its copy.
        """
        count = sum(fragment.values.numel() for fragment in fragments if fragment.owned)
        if self._buffer.result().numel() < count:
            self._buffer = self._thread.submit(_fresh_memory, count, self._cuda)

    def save(self, step: int, fragments: list[Fragment], writes: dict[str, Write]) -> list[Saved]:
        """Copy what this rank owns and go on; the writes follow in the background, in their order.

        Args:
            step: batches consumed.
            fragments: the state to be saved.
            writes: what to write, by its kind.

        Returns:
            How the save before ended, if it was still in flight.
        """
        start = time.monotonic()
        before = self.wait()
        copies = self._copy([fragment for fragment in fragments if fragment.owned])
        stall = time.monotonic() - start
        saves = [(Saved(kind, step, stall), write) for kind, write in writes.items()]
        self._writing = self._thread.submit(self._write, copies, saves, start)
        return before

    def finished(self) -> list[Saved]:
        """What has ended since this was last asked, without waiting."""
        return self.wait() if self._writing and self._writing.done() else []

    def wait(self) -> list[Saved]:
        """Wait for the save in flight, if there is one; how it ended."""
        writing, self._writing = self._writing, None
        return writing.result() if writing else []

    def close(self) -> None:
        """Let what is in flight end, well or badly."""
        self._thread.shutdown(wait=True)

    def _copy(self, fragments: list[Fragment]) -> list[Fragment]:
        self.reserve(fragments)
        buffer = self._buffer.result()
        copies, end = [], 0
        for fragment in fragments:
            start, end = end, end + fragment.values.numel()
            copy = buffer[start:end]
            copies.append(replace(fragment, values=copy.copy_(fragment.values, non_blocking=True)))
        if self._cuda:
            torch.cuda.synchronize()
        return copies

    def _write(
        self, copies: list[Fragment], saves: list[tuple[Saved, Write]], start: float
    ) -> list[Saved]:
        ended = []
        stall = max(self._line.gather(saves[0][0].stall))
        for saved, write in saves:
            path, problem = None, None
            try:
                path = write(copies, self._line)
            except UserError as error:  # agreed on by all ranks: the older saves are as they were
                problem = str(error)
            durable = time.monotonic() - start
            ended.append(Saved(saved.kind, saved.step, stall, durable, path, problem))
        return ended


def _fresh_memory(count: int, pinned: bool) -> Tensor:
    """Written once already: touching memory for the first time costs more than a copy into it."""
    try:
        return torch.zeros(count, pin_memory=pinned)
    except RuntimeError as error:  # copies into other memory are slower, not wrong
        if not pinned:
            raise
        say(f"warning: no page-locked memory for saves ({error})")
        return torch.zeros(count)
