"""Shards as an input: any image is one read away, and has its checksum in the index."""

from __future__ import annotations

import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from astropt_ds.config import DataConfig
from astropt_ds.data.decode import BadImageError
from astropt_ds.data.manifest import SPLITS
from astropt_ds.data.open_shards import DamagedError, OpenShards, read_labels
from astropt_ds.data.remote import open_store
from astropt_ds.data.split import Split
from astropt_ds.data.store import Folder
from astropt_ds.embedding.columns import SPLIT, Beside, add, carried, settle, type_of
from astropt_ds.embedding.galaxies import Failure, Reading
from astropt_ds.embedding.view import View
from astropt_ds.errors import UserError
from astropt_ds.ids import text_of
from astropt_ds.ingest.cells import key_of

OPEN_FILES = 8  # a process reads in order: a few shards of each split
SAMPLES = 200  # galaxies of a shard or split that are looked at for what most have
LOCAL_SHARDS = 8  # of a split, whose labels tell the types of columns
BLOCK = 1 << 20  # keys in memory at once


class Shards:
    """The galaxies of a data set's splits, in the order of the shards.

    Args:
        where: the data set, and the cache for one that is remote.
        splits: their names; all that hold samples if empty.
        columns: labels to carry along beside ra and dec.
        beside: a catalogue's columns, which come before the labels.
        ids: those to take; all if None.

    Raises:
        UserError: there is no such data set or split, or the cache is too small.
    """

    def __init__(
        self,
        where: DataConfig,
        splits: Sequence[str] = (),
        columns: Sequence[str] = (),
        beside: Beside | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        self.what = str(where.path)
        store = open_store(self.what, where)
        self.manifest = store.manifest
        named = splits or [name for name in SPLITS if self.manifest.splits[name].samples]
        self._splits = [Split(store, name) for name in named]
        self._first = np.concatenate([[0], np.cumsum([len(split) for split in self._splits])])
        needed = sum(store.cached_bytes(split.entry, 1) for split in self._splits[:1])
        if needed > where.cache_gb * 1e9:
            raise UserError(f"--cache-gb {where.cache_gb:g}: {needed / 1e9:.3g} would be right")
        self._columns, self._beside = columns, beside
        self._shards = OpenShards(OPEN_FILES)
        self._asked: set[tuple[str, int]] = set()  # shards that were asked for ahead
        self.missing: list[str] = []
        self._chosen = None if ids is None else self._choose(ids)

    @property
    def rows(self) -> int:
        """Galaxies that are asked for."""
        return int(self._first[-1]) if self._chosen is None else len(self._chosen)

    @property
    def identity(self) -> dict[str, Any]:
        """The pixels and their order."""
        names = [split.name for split in self._splits]
        return {"splits": names, "manifest": self.manifest.hash(tuple(names))}

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the bands."""
        return tuple(self.manifest.bands)

    @property
    def dtype(self) -> str:
        """Of the pixels."""
        return self.manifest.dtype

    @property
    def size(self) -> int:
        """Bytes of the images, their JSON and the headers between them."""
        whole = sum(shard.bytes for split in self._splits for shard in split.entry.shards)
        return whole * self.rows // max(1, int(self._first[-1]))

    def sides(self) -> Counter[int]:
        """Pixels along the shorter side of images from all over."""
        found: Counter[int] = Counter()
        for split in self._splits:
            places = np.unique(np.linspace(0, len(split) - 1, SAMPLES).astype(int))
            rows = split.index[places]
            found.update(np.minimum(rows["width"], rows["height"]).tolist())
        return found

    def types(self) -> dict[str, pa.DataType]:
        """Of the columns that are carried along; ``split`` is one."""
        labels = [cells for _, cells in self._first_labels()]
        present = list(dict.fromkeys(name for cells in labels for name in cells))
        found = {
            column: type_of(column, (cells.get(name) for cells in labels))
            for name, column in carried(present, self._columns).items()
        }
        own = {SPLIT: pa.string()}
        return {**own, **settle(found, self._beside, present, self._columns, self.what), **own}

    def read(self, first: int, stop: int, ahead: int, view: View, out: np.ndarray) -> Reading:
        """See :class:`~astropt_ds.embedding.galaxies.Galaxies`."""
        self._read_ahead(stop, ahead)
        rows = np.arange(first, stop) if self._chosen is None else self._chosen[first:stop]
        reading = Reading([], [], {})
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            for split, shard, local in self._by_shard(run):
                self._read_run(split, shard, local, view, out, reading)
        return reading._replace(unlisted=add(reading.cells, self._beside, reading.ids))

    def close(self) -> None:
        """Close all files."""
        self._shards.close()

    def _read_run(
        self,
        split: Split,
        shard: int,
        rows: np.ndarray,
        view: View,
        out: np.ndarray,
        reading: Reading,
    ) -> None:
        """Rows of a split that follow each other in one of its shards."""
        name = split.entry.shards[shard].name
        try:
            descriptor = self._shards.descriptor(split, shard)
            labels = list(read_labels(descriptor, split, rows))
        except (UserError, OSError) as error:
            for row in rows:
                place = len(reading.ids)
                identifier = self._identifier(split, int(row), {})
                reading.ids.append(identifier)
                reading.cells.append({})
                reading.failures[place] = Failure(identifier, name, str(error), unreachable=True)
                out[place] = 0
            return
        for row, beside in zip(rows, labels, strict=True):
            place = len(reading.ids)
            known = {} if isinstance(beside, BadImageError) else beside
            identifier = self._identifier(split, int(row), known)
            reading.ids.append(identifier)
            names = carried(list(known), self._columns)
            cells = {column: known[label] for label, column in names.items()}
            reading.cells.append({**cells, SPLIT: split.name})
            try:
                if isinstance(beside, BadImageError):
                    raise beside
                data = self._shards.image(split, int(row), descriptor)
                view.of_file(data, out[place], self.manifest.nan == "zero", verified=True)
            except (BadImageError, OSError) as error:
                damaged = isinstance(error, (DamagedError, OSError))
                reading.failures[place] = Failure(identifier, name, str(error), damaged)
                out[place] = 0

    def _by_shard(self, run: np.ndarray) -> Iterator[tuple[Split, int, np.ndarray]]:
        """Numbers that follow each other, as rows of splits, cut where shards end."""
        for split, first, last in zip(self._splits, self._first, self._first[1:], strict=False):
            local = run[(run >= first) & (run < last)] - first
            if len(local):
                shards = np.searchsorted(split.first, local, side="right") - 1
                cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(local)]
                for start, stop in pairwise(cuts):
                    yield split, int(shards[start]), local[start:stop]

    def _read_ahead(self, start: int, stop: int) -> None:
        """Have the shards of these galaxies at hand soon."""
        rows = np.arange(start, stop) if self._chosen is None else self._chosen[start:stop]
        for split, shard, _ in self._by_shard(rows):
            if (split.name, shard) not in self._asked:
                self._asked.add((split.name, shard))
                split.store.read_ahead([split.entry.shards[shard]])

    def _first_labels(self) -> list[tuple[str, dict[str, Any]]]:
        """(key, labels) of the first galaxies of a few shards of each split."""
        found = []
        for split in self._splits:
            filled = [n for n, shard in enumerate(split.entry.shards) if shard.samples]
            # remote ones would all have to be fetched for it
            few = LOCAL_SHARDS if isinstance(split.store, Folder) else 1
            for shard in filled[:: -(-len(filled) // few)]:
                first = int(split.first[shard])
                rows = first + np.arange(min(SAMPLES, split.entry.shards[shard].samples))
                try:
                    descriptor = self._shards.descriptor(split, shard)
                except UserError:
                    continue  # told when its galaxies are read
                for row, cells in zip(rows, read_labels(descriptor, split, rows), strict=True):
                    if not isinstance(cells, BadImageError):
                        found.append((split.index[row]["key"].decode(errors="replace"), cells))
        return found

    def _identifier(self, split: Split, row: int, labels: dict[str, Any]) -> str:
        if labels.get("id") not in (None, ""):
            return text_of(labels["id"])
        key = split.index[row]["key"].decode(errors="replace")
        return urllib.parse.unquote(key) if self._keys_are_ids else key

    @cached_property
    def _keys_are_ids(self) -> bool:
        """Whether keys are made of ids, as tools/make_shards.py makes them."""
        return all(key == key_of(text_of(cells.get("id"))) for key, cells in self._first_labels())

    def _choose(self, ids: Sequence[str]) -> np.ndarray:
        """The numbers of the galaxies that have these ids, in the order of the shards."""
        search = self._search_keys if self._keys_are_ids else self._search_labels
        found = dict(search(set(ids)))
        held = set(found.values())
        self.missing = [identifier for identifier in dict.fromkeys(ids) if identifier not in held]
        return np.array(sorted(found), np.int64)

    def _search_keys(self, wanted: set[str]) -> Iterator[tuple[int, str]]:
        """(number, id) of the galaxies that are wanted."""
        keys = {key_of(identifier).encode(): identifier for identifier in wanted}
        for split, first in zip(self._splits, self._first, strict=False):
            for start in range(0, len(split), BLOCK):
                block = split.index["key"][start : start + BLOCK]
                for i in np.flatnonzero(np.isin(block, np.array([*keys], bytes))):
                    yield int(first) + start + int(i), keys[bytes(block[i])]

    def _search_labels(self, wanted: set[str]) -> Iterator[tuple[int, str]]:
        for split, first in zip(self._splits, self._first, strict=False):
            for _, shard, rows in self._by_shard(first + np.arange(len(split))):
                descriptor = self._shards.descriptor(split, shard)
                labels = read_labels(descriptor, split, rows)
                for row, cells in zip(rows, labels, strict=True):
                    known = {} if isinstance(cells, BadImageError) else cells
                    identifier = self._identifier(split, int(row), known)
                    if identifier in wanted:
                        yield int(first) + int(row), identifier
