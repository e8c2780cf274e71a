"""Folders of images and of FITS files, Parquet and HDF5 files as inputs, without shards of them."""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from astropt_ds.data.decode import BadImageError, check_finite, decode
from astropt_ds.embedding.columns import Beside, add, carried, settle, type_of_cells
from astropt_ds.embedding.galaxies import Failure, Reading
from astropt_ds.embedding.view import View
from astropt_ds.errors import UserError
from astropt_ds.ingest.cells import labels_of
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.plan import place_of, stretch_of
from astropt_ds.ingest.source import FILE, ID, Picture, Row, Source, spread, state_of
from astropt_ds.ingest.survey import Survey, open_source, open_survey, read_catalogue_of

PLACE = "__place__"


class Surveys:
    """The galaxies of a survey, in the order of its table.

    Where files hold many galaxies each, one file's table at a time is in memory.

    Args:
        job: the survey, as tools/make_shards.py takes it. Its catalogue's columns are carried
            along: those in ``columns``, or all.
        what: it is, as the user calls it.
        columns: to carry along beside ra and dec.
        ids: those to take; all if None.

    Attributes:
        notes: what a user should know.

    Raises:
        UserError: it is not there or not usable.
    """

    def __init__(
        self,
        job: Job,
        what: str,
        columns: Sequence[str] = (),
        ids: Sequence[str] | None = None,
    ) -> None:
        job.check_input()
        self.what = what
        source = open_source(job)
        self._files = source.files()
        catalogue = None
        if source.sequential:
            if job.filter:
                raise UserError(f"--filter {job.filter!r}: goes with images that are a file each")
            catalogue = read_catalogue_of(job, source) if job.catalogue else None
            named = tuple(carried(source.columns, columns)) or (source.id_column,)
            labels = named if source.id_column else ()
            job = replace(job, catalogue=None, catalogue_id_column=None, columns=labels)
        self._job, self._columns = job, columns
        self._chosen = None if ids is None else set(ids)
        self._part = lru_cache(maxsize=2)(self._open)
        self._stops = np.cumsum(self._counts(source)).tolist()
        self.missing = [] if ids is None else self._missing(ids)
        if not self.rows:
            raise UserError(f"no images in {self.what}")
        first = self._part(bisect.bisect_right(self._stops, 0))
        self.notes = first.notes
        if not source.sequential and job.catalogue:
            catalogue = first.catalogue
        self._beside = None if catalogue is None else Beside(catalogue, columns, job.file_column)
        self._facts = first.source.facts(first.rows)
        self._stretch = stretch_of(job, self._facts)

    def _open(self, number: int) -> Survey:
        """One file's part of the survey, or all of it where an image is a file."""
        job = self._job
        if self._files:
            only: dict[str, Any] = {job.kind: (self._files[number],)}
            job = replace(job, **only)
        survey = open_survey(job)
        if self._chosen is None:
            return survey
        return replace(survey, rows=survey.rows[survey.rows[ID].isin(self._chosen)])

    def _counts(self, source: Source) -> list[int]:
        """Galaxies of each part."""
        if not self._files:
            return [len(self._part(0).rows)]
        counts = [source.count(path) for path in self._files]
        if self._chosen is not None:
            counts = [n and len(self._part(number).rows) for number, n in enumerate(counts)]
        return counts

    def _missing(self, ids: Sequence[str]) -> list[str]:
        held: set[str] = set()
        for number in range(len(self._stops)):
            if self._stops[number] > (self._stops[number - 1] if number else 0):
                held.update(self._part(number).rows[ID])
        return [identifier for identifier in dict.fromkeys(ids) if identifier not in held]

    @property
    def rows(self) -> int:
        """Galaxies that are asked for."""
        return self._stops[-1]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of the files."""
        if self._files:
            return {"files": state_of(self._files)}
        survey = self._part(0)
        ids = hashlib.sha256("\n".join(survey.rows[ID]).encode()).hexdigest()
        return {"files": survey.source.state(survey.rows), "ids": ids}

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the bands."""
        return ("R", "G", "B") if self._stretch else self._facts.bands

    @property
    def dtype(self) -> str:
        """Of the pixels."""
        return "uint8" if self._stretch else self._facts.dtype

    @property
    def size(self) -> int:
        """Bytes of the files."""
        if self._files:
            return sum(path.stat().st_size for path in self._files)
        survey = self._part(0)
        paths = [survey.source.base / name for name in spread(survey.rows)[FILE].dropna()]
        sizes = [path.stat().st_size for path in paths if path.is_file()]
        return sum(sizes) * self.rows // max(1, len(sizes))

    def sides(self) -> Counter[int]:
        """Pixels along the shorter side of images from all over; of files of many, the first."""
        part = self._part(bisect.bisect_right(self._stops, 0))
        rows = part.rows[part.rows[FILE].notna()]
        found: Counter[int] = Counter()
        problems = []
        for row, picture in part.source.read(spread(rows), self._facts):
            try:
                if isinstance(picture, BadImageError):
                    raise picture
                pixels = picture.pixels
                image = decode(pixels) if isinstance(pixels, bytes) else pixels
                found[min(image.shape[:2])] += 1
            except BadImageError as error:
                problems.append(f"{part.source.base / place_of(row)}: {error}")
        if not found:
            first = problems[0] if problems else "has no file name"
            raise UserError(f"{self.what}: none of {len(problems)} images is usable; {first}")
        return found

    def types(self) -> dict[str, pa.DataType]:
        """Of the columns that are carried along."""
        source = self._part(bisect.bisect_right(self._stops, 0)).source
        names = carried(source.columns, self._columns)
        found = {}
        if names:
            table = source.table(lambda name: name in names)
            found = {column: type_of_cells(column, table[name]) for name, column in names.items()}
        return settle(found, self._beside, source.columns, self._columns, self.what)

    def read(self, first: int, stop: int, ahead: int, view: View, out: np.ndarray) -> Reading:
        """See :class:`~astropt_ds.embedding.galaxies.Galaxies`."""
        # a file that has changed may lack what it held
        gone = Failure("", self.what, "is no longer there", unreachable=True)
        failures = dict.fromkeys(range(stop - first), gone)
        ids, cells = [""] * (stop - first), [dict[str, Any]() for _ in range(stop - first)]
        out[:] = 0
        for row, picture, labels in self._pictures(first, stop):
            place = row[PLACE]
            ids[place] = row[ID]
            names = carried(list(labels), self._columns)
            cells[place] = {column: labels[label] for label, column in names.items()}
            try:
                if isinstance(picture, BadImageError):
                    raise picture
                self._cut(picture.pixels, view, out[place])
                del failures[place]
            except BadImageError as error:
                failures[place] = Failure(row[ID], place_of(row), str(error))
                out[place] = 0
        return Reading(ids, cells, failures, add(cells, self._beside, ids))

    def close(self) -> None:
        """Nothing stays open."""

    def _pictures(
        self, first: int, stop: int
    ) -> Iterator[tuple[Row, Picture | BadImageError, dict[str, Any]]]:
        """Each of [first, stop), in any order: its row with PLACE, its image, its labels."""
        number, at = bisect.bisect_right(self._stops, first), first
        while at < stop:
            begin = self._stops[number - 1] if number else 0
            end = min(stop, self._stops[number])
            if at < end:
                part = self._part(number)
                rows = part.rows.iloc[at - begin : end - begin]
                rows = rows.assign(**{PLACE: np.arange(at - first, end - first)})
                unnamed = rows[FILE].isna()
                for row in rows[unnamed].to_dict("records"):
                    yield row, BadImageError("has no file name"), {}
                named = part.source.id_column
                for row, picture in part.source.read(rows[~unnamed], self._facts):
                    beside = {} if isinstance(picture, BadImageError) else picture.labels
                    yield row, picture, labels_of(beside, named)
                at = end
            number += 1

    def _cut(self, pixels: bytes | np.ndarray, view: View, out: np.ndarray) -> None:
        zero = self._job.nan == "zero"
        if isinstance(pixels, bytes):
            view.of_file(pixels, out)
            return
        if self._stretch:
            check_finite(pixels, zero)
            pixels = self._stretch(np.where(np.isfinite(pixels), pixels, 0))
        view.of_pixels(pixels, out, zero)
