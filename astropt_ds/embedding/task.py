"""One of the tasks that make a table: it takes parts that nobody has, embeds them, writes them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from astropt_ds.embedding.claims import Claims
from astropt_ds.embedding.columns import array
from astropt_ds.embedding.embedder import Embedder
from astropt_ds.embedding.galaxies import Failure, Reading
from astropt_ds.embedding.parts import Parts
from astropt_ds.embedding.plan import Plan
from astropt_ds.embedding.progress import Progress
from astropt_ds.embedding.reader import Chunk, Reader
from astropt_ds.embedding.recipe import Recipe
from astropt_ds.table.schema import table_schema

WAIT_S = 0.5  # before looking again what others have done
WRITING = 2  # parts that wait to be written: each is in memory


class Task:
    """One task's share of a table, which is whatever nobody else has done.

    Args:
        plan: that all tasks agree on.
        parts: of the table.
        claims: of this task.
        reader: of the galaxies.
        embedder: makes embeddings.
        recipe: of them.
        dtype: of the embeddings in the table.
        start: the part to begin with; others begin elsewhere.
    """

    def __init__(
        self,
        plan: Plan,
        parts: Parts,
        claims: Claims,
        reader: Reader,
        embedder: Embedder,
        recipe: Recipe,
        dtype: str,
        start: int,
    ) -> None:
        self.plan, self.parts, self.claims = plan, parts, claims
        self.reader, self.embedder, self.recipe = reader, embedder, recipe
        self.dtype, self.start = dtype, start
        self.schema = table_schema(plan.columns, recipe.columns, dtype, plan.facts)
        # To be done again, once: what could not be looked at may be there by now.
        self._again = parts.lacking()

    def run(self, progress: Progress) -> None:
        """Work until all parts are finished, by whomever.

        Raises:
            UserError: nothing can be read or embedded.
            OSError: a part cannot be written.
        """
        with ThreadPoolExecutor(1) as pool:
            while True:
                writing: list[Future[None]] = []
                try:
                    chunks = self.reader.read(self._open_parts())
                    for part, mine in groupby(chunks, lambda chunk: chunk.part):
                        readings: list[Reading] = []
                        embeddings = self._embed(part, self._watched(mine, readings, progress))
                        writing.append(pool.submit(self._write, part, readings, embeddings))
                        if len(writing) > WRITING:
                            writing.pop(0).result()
                finally:
                    for future in writing:
                        future.result()
                done = self.done()
                progress.update(self.plan.galaxies(done))
                if len(done) == self.plan.parts:
                    return
                time.sleep(WAIT_S)

    def _watched(
        self, chunks: Iterable[Chunk], readings: list[Reading], progress: Progress
    ) -> Iterator[Chunk]:
        """Chunks on their way, whose readings are kept and whose galaxies are shown."""
        for chunk in chunks:
            readings.append(chunk.reading)
            yield chunk
            if progress.is_due():
                progress.update(self.plan.galaxies(self.done()))

    def done(self) -> set[int]:
        """Parts that are finished, and not to be done again."""
        return {part for part in self.parts.finished() if not self._is_due(part)}

    def _is_due(self, part: int) -> bool:
        """Whether a part is to be done: nobody has, or not since it was found lacking."""
        return self.parts.state(part) == self._again.get(part)

    def _open_parts(self) -> Iterator[tuple[int, int, int]]:
        """(part, first, stop) of parts that nobody has, each claimed as it is taken."""
        count = self.plan.parts
        done = self.done()
        for number in range(count):
            part = (self.start + number) % count
            if part in done or not self.claims.take(self.parts.name(part)):
                continue
            if self._is_due(part):
                yield part, *self.plan.bounds(part)
            else:  # another task has finished it since
                self.claims.release(self.parts.name(part))

    def _embed(self, part: int, chunks: Iterable[Chunk]) -> dict[str, np.ndarray]:
        """The embeddings of a part, by column.

        Batches begin with the part: what others do, and where shards end, changes none of them.
        """
        first, stop = self.plan.bounds(part)
        out = {
            name: torch.empty((stop - first, *shape), device=self.embedder.device)
            for name, shape in self.recipe.columns.items()
        }
        batch, filled, done = self._batch, 0, 0
        for chunk in chunks:
            patches = torch.from_numpy(chunk.patches)
            while len(patches):
                taken = min(len(batch) - filled, len(patches))
                batch[filled : filled + taken].copy_(patches[:taken])
                patches, filled = patches[taken:], filled + taken
                if filled == len(batch) or done + filled == stop - first:
                    embedded = self.embedder.embed_patches(batch[:filled], self.recipe)
                    for name, embedding in embedded.items():
                        out[name][done : done + filled] = embedding
                    done, filled = done + filled, 0
        return {name: embeddings.cpu().numpy() for name, embeddings in out.items()}

    @cached_property
    def _batch(self) -> Tensor:
        """Memory on the device for the patches of a batch."""
        view = self.reader.view
        size = min(self.embedder.batch(view.tokens), self.plan.part_rows)
        dtype = torch.uint8 if view.dtype == "uint8" else torch.float32
        return torch.empty((size, *view.shape), dtype=dtype, device=self.embedder.device)

    def _write(
        self, part: int, readings: Sequence[Reading], embeddings: dict[str, np.ndarray]
    ) -> None:
        """Write a part, less the galaxies that failed."""
        ids = [identifier for reading in readings for identifier in reading.ids]
        cells = [known for reading in readings for known in reading.cells]
        failures: dict[int, Failure] = {}
        start = 0
        for reading in readings:
            failures |= {start + place: failure for place, failure in reading.failures.items()}
            start += len(reading.ids)
        failures = {**self._unfit(ids, embeddings), **failures}
        kept = np.array([place for place in range(len(ids)) if place not in failures], np.int64)
        columns = {"id": pa.array([ids[place] for place in kept], pa.string())}
        where = self.parts.name(part)
        for name, kind in self.plan.columns.items():
            known = [cells[place].get(name) for place in kept]
            columns[name] = array(known, kind, name, where)
        for name, values in embeddings.items():
            flat = pa.array(values[kept].astype(self.dtype).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, math.prod(values.shape[1:]))
        table = pa.table([columns[name] for name in self.schema.names], schema=self.schema)
        unlisted = sum(reading.unlisted for reading in readings)
        self.parts.commit(part, table, [failures[place] for place in sorted(failures)], unlisted)
        self.claims.release(where)

    def _unfit(self, ids: Sequence[str], embeddings: dict[str, np.ndarray]) -> dict[int, Failure]:
        """The galaxies whose embeddings cannot be stored."""
        found = {}
        for values in embeddings.values():
            largest = np.abs(values).reshape(len(values), -1).max(axis=1)
            for place in np.flatnonzero(~(largest <= np.finfo(self.dtype).max)).tolist():
                reason = "its embedding is not finite"
                if np.isfinite(largest[place]):
                    reason = f"its embedding is too large for {self.dtype}"
                found[place] = Failure(ids[place], "", reason)
        return found
