"""HDF5 files of image arrays, one row an object, in either of two layouts.

Multimodal Universe: ``image_array`` (n, bands, height, width), ``image_band`` (n, bands), and a
dataset of length n for each label, ``object_id`` among them. Stein et al.: ``images`` (n, bands,
height, width) without names of bands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from astropt_ds.data.decode import BadImageError
from astropt_ds.errors import UserError, one_line
from astropt_ds.extras import optional
from astropt_ds.ids import text_of
from astropt_ds.ingest.cells import ID_COLUMNS, id_column, plain, texts
from astropt_ds.ingest.source import (
    FILE,
    ID,
    ROW,
    Facts,
    Needed,
    Picture,
    Row,
    choose_bands,
    common_base,
    each_readable,
    find_files,
    first_readable,
    spread,
    stack,
)

IMAGES = ("image_array", "images")  # datasets of images, and the bands of the first
BANDS = "image_band"
STEIN_ID = "inds"
MAX_BYTES = 32 * 2**20  # of images in memory at once


@dataclass(frozen=True)
class HDF5Files:
    """HDF5 files and folders of them.

    Args:
        paths: files, or folders that are searched for ``*.hdf5`` and ``*.h5``.
        bands: which to take, in order; all if empty. They name those that have no names.
        named_id: the dataset of the ids; the first of the usual ones, or else the file's name
            and the row, if None.
        labels: the datasets to keep as labels; all if empty.
    """

    paths: tuple[Path, ...]
    bands: tuple[str, ...] = ()
    named_id: str | None = None
    labels: tuple[str, ...] = ()
    sequential: ClassVar[bool] = True
    unreadable: list[tuple[str, str]] = field(default_factory=list, init=False, compare=False)

    def __post_init__(self) -> None:
        optional("h5py", "--hdf5")

    @cached_property
    def base(self) -> Path:
        """The folder that file names are relative to."""
        return common_base(self.paths)

    @cached_property
    def columns(self) -> list[str]:
        """What is said about an image, in the first file."""
        with self._first() as file:
            return _columns(file)

    @cached_property
    def left_out(self) -> list[str]:
        """Datasets that are no one value an image."""
        with self._first() as file:
            known = {*_columns(file), _images(file).name.lstrip("/"), BANDS}
            return [name for name in file if name not in known]

    @cached_property
    def id_column(self) -> str:
        """Of the ids among the columns; empty where files and rows name the images."""
        usual = (*ID_COLUMNS, STEIN_ID)
        if self.named_id is None and not any(name in self.columns for name in usual):
            return ""
        named = self.named_id or next(name for name in usual if name in self.columns)
        return id_column(named, self.columns, "id-column", str(self.files()[0]))

    def _first(self) -> Any:
        """The first file that can be read; else the first one's error is raised."""
        return first_readable(self.files(), _open)

    def files(self) -> list[Path]:
        """The HDF5 files."""
        return find_files(self.paths, (".hdf5", ".h5"), "--hdf5")

    def count(self, file: Path) -> int:
        """How many images a file holds."""
        with _open(file) as opened:
            return len(_images(opened))

    def table(self, needed: Needed) -> pd.DataFrame:
        """A row an image."""
        wanted = [name for name in self.columns if needed(name)]
        parts = {}
        for path, file in each_readable(self.files(), _open, self.unreadable):
            with file:
                parts[path] = self._part(file, path, wanted)
        return stack(list(parts.values()), list(parts), self.base)

    def _part(self, file: Any, path: Path, wanted: Sequence[str]) -> pd.DataFrame:
        present = _columns(file)
        for name in [self.id_column, *wanted] if self.id_column else wanted:
            if name not in present:
                raise UserError(f"{path}: has no dataset {name!r}; it has {', '.join(present)}")
        part = pd.DataFrame({name: _values(file[name][:]) for name in wanted})
        if self.id_column:
            ids = pd.Series(list(file[self.id_column][:]), dtype=object)
            part[ID] = texts(ids, self.id_column, str(path))
        else:
            part[ID] = [f"{path.stem}-{row}" for row in range(len(_images(file)))]
        return part

    def state(self, rows: pd.DataFrame) -> str:
        """Nothing: :meth:`files` tells."""
        return ""

    def facts(self, table: pd.DataFrame) -> Facts:
        """The type and bands that most of some images have."""
        found: Counter[Facts] = Counter()
        problem = None
        for name, part in spread(table).groupby(FILE, observed=True, sort=False):
            with _open(self.base / str(name)) as file:
                images = _images(file)
                dtype: Any = "uint8" if images.dtype == np.uint8 else "float32"
                for row in part[ROW]:
                    try:
                        _, bands = choose_bands(_bands(file, row), images.shape[1], self.bands)
                        found[Facts(dtype, bands)] += 1
                    except BadImageError as error:
                        problem = problem or f"--hdf5 {self.base / str(name)}: {error}"
        if not found:
            raise UserError(str(problem))
        return found.most_common(1)[0][0]

    def read(
        self, rows: pd.DataFrame, facts: Facts
    ) -> Iterator[tuple[Row, Picture | BadImageError]]:
        """Each row with its pixels, (height, width, channels)."""
        h5py = optional("h5py", "--hdf5")
        for name, part in rows.groupby(FILE, observed=True, sort=False):
            waiting = {row[ROW]: row for row in part.to_dict("records")}
            try:
                with h5py.File(self.base / str(name)) as file:
                    for row, picture in self._read_file(file, [*waiting.values()], facts):
                        yield waiting.pop(row[ROW]), picture
            except (OSError, RuntimeError) as error:
                for row in waiting.values():
                    yield row, BadImageError(f"cannot be read ({one_line(error)})")

    def _read_file(
        self, file: Any, records: list[Row], facts: Facts
    ) -> Iterator[tuple[Row, Picture | BadImageError]]:
        images = _images(file)
        first = min(row[ROW] for row in records)
        last = max(row[ROW] for row in records)
        names = [c for c in _columns(file) if not self.labels or c in self.labels]
        labels = {name: _values(file[name][first : last + 1]) for name in names}
        longest = max(1, MAX_BYTES // max(1, images.nbytes // max(1, len(images))))
        for run in _runs(records, longest):
            for row, planes in _stacks(images, run):
                try:
                    picture = self._pixels(planes, _bands(file, row[ROW]), facts)
                except BadImageError as error:
                    yield row, error
                    continue
                beside = {name: values[row[ROW] - first] for name, values in labels.items()}
                yield row, Picture(picture, beside)

    def _pixels(
        self, planes: np.ndarray | BadImageError, names: list[str] | None, facts: Facts
    ) -> np.ndarray:
        if isinstance(planes, BadImageError):
            raise planes
        if (planes.dtype == np.uint8) != (facts.dtype == "uint8"):
            raise BadImageError(f"holds {planes.dtype}; {facts.dtype} as the others would be right")
        chosen, bands = choose_bands(names, len(planes), self.bands)
        if bands != facts.bands:
            raise BadImageError(
                f"has bands {' '.join(bands)}; {' '.join(facts.bands)} as the others would be right"
            )
        with np.errstate(over="ignore"):  # what is too large for float32 is not finite then
            return np.moveaxis(planes[chosen], 0, 2).astype(facts.dtype, order="C")


def _open(path: Path) -> Any:
    h5py = optional("h5py", "--hdf5")
    try:
        return h5py.File(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None


def _images(file: Any) -> Any:
    for name in IMAGES:
        if name in file and getattr(file[name], "ndim", 0) == 4:
            return file[name]
    raise UserError(
        f"{file.filename}: has no dataset {' or '.join(IMAGES)} of (n, bands, height, width); "
        f"it has {', '.join(file)}"
    )


def _columns(file: Any) -> list[str]:
    """The datasets that hold one value an image."""
    shape = _images(file).shape[:1]
    return [
        name
        for name, dataset in file.items()
        if getattr(dataset, "shape", None) == shape and dataset.dtype.kind != "V"
    ]


def _values(array: np.ndarray) -> Any:
    """A dataset as a column: bytes as text, numbers in this machine's byte order."""
    if array.dtype.kind in "SO":
        return [plain(value) for value in array]
    return array.astype(array.dtype.newbyteorder("="))


def _bands(file: Any, row: int) -> list[str] | None:
    return [text_of(name) for name in file[BANDS][row]] if BANDS in file else None


def _runs(records: list[Row], longest: int) -> Iterator[list[Row]]:
    """Rows that follow each other in the file, so many at most: each run is one read."""
    run: list[Row] = []
    for row in records:
        if run and (row[ROW] != run[-1][ROW] + 1 or len(run) == longest):
            yield run
            run = []
        run.append(row)
    yield run


def _stacks(images: Any, run: list[Row]) -> Iterator[tuple[Row, np.ndarray | BadImageError]]:
    """The images of a run, (bands, height, width) each, or why one cannot be read."""
    try:
        yield from zip(run, images[run[0][ROW] : run[-1][ROW] + 1], strict=True)
    except (OSError, RuntimeError) as error:  # a damaged chunk; its neighbours may be whole
        if len(run) == 1:
            yield run[0], BadImageError(f"cannot be read ({one_line(error)})")
        else:
            for row in run:
                yield from _stacks(images, [row])
