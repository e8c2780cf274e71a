"""Galaxies read by several processes, part by part, as patches in shared memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from astropt_ds.data.parallel import usable_cpus
from astropt_ds.data.pool import Failure as Lost
from astropt_ds.data.pool import Pool
from astropt_ds.embedding.galaxies import Galaxies, Reading
from astropt_ds.embedding.view import View
from astropt_ds.errors import UserError

STREAM = "galaxies"
CHUNK_BYTES = 32_000_000  # of patches that a process reads at a time
CHUNK = 256  # galaxies; few enough for several processes to share a batch


class Chunk(NamedTuple):
    """Galaxies that follow each other in a part.

    Attributes:
        part: they belong to.
        first: the number of the first of them.
        patches: (galaxies, tokens, values); valid until the next chunk is taken.
        reading: what is known about them.
    """

    part: int
    first: int
    patches: np.ndarray
    reading: Reading


class _Item(NamedTuple):
    part: int
    first: int
    stop: int
    end: int  # of the part


class _Read:
    """What a process does with an item."""

    def __init__(self, galaxies: Galaxies, view: View) -> None:
        self.galaxies, self.view = galaxies, view

    def __call__(self, stream: str, item: _Item, slot: memoryview) -> Reading:
        out = _patches(slot, item.stop - item.first, self.view)
        return self.galaxies.read(item.first, item.stop, item.end, self.view, out)


class Reader:
    """Reads parts of an input. To be made before this process starts threads.

    Args:
        galaxies: the input.
        view: what to take of each image.
        workers: processes that read; 0 reads in this one.
    """

    def __init__(self, galaxies: Galaxies, view: View, workers: int) -> None:
        self.view = view
        self.chunk = max(1, min(CHUNK, CHUNK_BYTES // view.image_bytes))
        self._galaxies = galaxies
        capacity = self.chunk * view.image_bytes
        galaxies.close()  # files that forks inherit are read from at one common place
        self._pool = Pool(_Read(galaxies, view), workers, [STREAM], capacity)

    def read(self, parts: Iterable[tuple[int, int, int]]) -> Iterator[Chunk]:
        """The galaxies of parts, in order.

        Args:
            parts: (part, first, stop) of each; the next is taken before all of this one is read.

        Raises:
            UserError: nothing can be read.
        """
        coming: deque[_Item] = deque()
        for slot, reply in self._pool.run(STREAM, self._items(parts, coming)):
            item = coming.popleft()
            if isinstance(reply, Lost):
                raise UserError(reply.message)
            patches = _patches(slot, item.stop - item.first, self.view)
            yield Chunk(item.part, item.first, patches, reply)

    def close(self) -> None:
        """End the processes."""
        self._pool.close()
        self._galaxies.close()

    def _items(
        self, parts: Iterable[tuple[int, int, int]], coming: deque[_Item]
    ) -> Iterator[_Item]:
        for part, first, end in parts:
            for start in range(first, end, self.chunk):
                item = _Item(part, start, min(end, start + self.chunk), end)
                coming.append(item)
                yield item


def find_workers(wanted: int | str, device: str) -> int:
    """How many processes are to read.

    Args:
        wanted: a number, or ``auto``: those that a GPU leaves idle, of this task's share of the
            machine; one beside a computation on the same processors.
        device: that computes.

    Raises:
        UserError: it is neither.
    """
    if wanted == "auto":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's tasks share the processors
        return max(1, min(16, usable_cpus() // here - 1)) if device != "cpu" else 1
    if not isinstance(wanted, int) or wanted < 0:
        raise UserError(f"--workers {wanted}: auto, or 0 or more, would be right")
    return wanted


def _patches(slot: memoryview, images: int, view: View) -> Any:
    shape = (images, *view.shape)
    return np.frombuffer(slot, view.dtype, int(np.prod(shape))).reshape(shape)
