"""What every kind of survey offers: a table of its images, and the images of some rows of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pandas as pd

from astropt_ds.data.decode import BadImageError
from astropt_ds.data.split_names import SPLIT_OF_WORD
from astropt_ds.errors import UserError

# Columns of a source's table that are not the survey's own.
ID = "__id__"  # of the image, as text
FILE = "__file__"  # where it lies, relative to Source.base
ROW = "__row__"  # which of the images in the file it is

Row = dict[Any, Any]  # of a table, by column
Needed = Callable[[str], bool]  # whether a column of the survey is wanted in the table


@dataclass(frozen=True)
class Facts:
    """What all images of a source have in common."""

    dtype: Literal["uint8", "float32"]
    bands: tuple[str, ...]  # a name a channel, in their order


class Picture(NamedTuple):
    """An image as its survey keeps it."""

    pixels: bytes | np.ndarray  # a JPEG or PNG file, or (height, width, channels) uint8 or float32
    labels: dict[str, Any]  # what lies beside it
    suffix: str | None = None  # of the file, where its name says


class Source(Protocol):
    """A survey's images, read where they lie."""

    @property
    def base(self) -> Path:
        """The folder that file names are relative to."""

    @property
    def id_column(self) -> str:
        """Of the ids among the columns; empty where files and rows name the images."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of what the survey itself says about an image."""

    @property
    def left_out(self) -> Sequence[str]:
        """Names of what is there and not used: second images, arrays, files."""

    @property
    def sequential(self) -> bool:
        """Whether images are best read in the order of the table."""

    @property
    def unreadable(self) -> Sequence[tuple[str, str]]:
        """(file, reason) of each file of many images that :meth:`table` could not read."""

    def files(self) -> list[Path]:
        """The files that hold many images each."""

    def count(self, file: Path) -> int:
        """How many images one of these holds; raises UserError."""

    def state(self, rows: pd.DataFrame) -> str:
        """Changes when the files of these images do, where each has its own."""

    def table(self, needed: Needed) -> pd.DataFrame:
        """A row an image, in the order of the files: ID, FILE, ROW and the columns needed."""

    def facts(self, table: pd.DataFrame) -> Facts:
        """What the images of a table have in common: what most of a few of them have."""

    def read(
        self, rows: pd.DataFrame, facts: Facts
    ) -> Iterator[tuple[Row, Picture | BadImageError]]:
        """Each of some rows of the table with its image, or with what is wrong with it."""


TRIALS = 20  # images to look at for what most have


def spread(table: pd.DataFrame) -> pd.DataFrame:
    """A few rows from all over a table."""
    places = np.linspace(0, len(table) - 1, min(len(table), TRIALS)).round().astype(int)
    return table.iloc[places]


def state_of(files: Iterable[Path]) -> str:
    """A digest of names, sizes and times of files."""
    digest = hashlib.sha256()
    for file in files:
        try:
            stat = file.stat()
            facts = [str(file), stat.st_size, stat.st_mtime_ns]
        except OSError as error:
            facts = [str(file), error.errno]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


RGB = Facts("uint8", ("R", "G", "B"))


def find_files(paths: Sequence[Path], suffixes: Sequence[str], option: str) -> list[Path]:
    """The files that are named, and those below the folders that are, in the order of their names.

    Raises:
        UserError: a path is not there, or a folder holds no such file.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = (p for p in path.rglob("*") if p.name.lower().endswith(tuple(suffixes)))
            files = sorted(p for p in below if not p.is_dir())
            if not files:
                kinds = ", ".join(f"*{suffix}" for suffix in suffixes)
                raise UserError(f"{option} {path}: holds no file {kinds}")
            found += files
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{option} {path}: is not there")
    return list(dict.fromkeys(found))


def first_readable(files: Sequence[Path], open_: Callable[[Path], Any]) -> Any:
    """The first of some files that opens.

    Raises:
        UserError: none does; what is wrong with the first.
    """
    problem = None
    for file in files:
        try:
            return open_(file)
        except UserError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def each_readable(
    files: Sequence[Path], open_: Callable[[Path], Any], unreadable: list[tuple[str, str]]
) -> Iterator[tuple[Path, Any]]:
    """(path, opened file) of those that open; the others are noted as (file, reason)."""
    for path in files:
        try:
            file = open_(path)
        except UserError as error:
            unreadable.append((str(path), str(error).removeprefix(f"{path}: ")))
            continue
        yield path, file


def files_below(base: Path, suffixes: Sequence[str]) -> list[str]:
    """The paths of files below a folder, relative to it, in order.

    Raises:
        UserError: one of them is no text.
    """
    below = (p for p in base.rglob("*") if p.name.lower().endswith(tuple(suffixes)))
    names = sorted(path.relative_to(base).as_posix() for path in below)
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{base}: the name {name!a} is not UTF-8; rename the file") from None
    return names


def common_base(paths: Sequence[Path]) -> Path:
    """The deepest folder that holds all of the given files and the insides of the given folders.

    The parent of a folder that is named as a split is, so that its name is part of what it holds.
    """
    whole = [path.absolute() for path in paths]
    folders = [
        path if path.is_dir() and path.name.lower() not in SPLIT_OF_WORD else path.parent
        for path in whole
    ]
    return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))


def stack(parts: Sequence[pd.DataFrame], files: Sequence[Path], base: Path) -> pd.DataFrame:
    """The tables of several files as one, with the FILE and ROW of each image."""
    names = [str(path.absolute().relative_to(base)) for path in files]
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    table = pd.concat(parts, ignore_index=True)
    table[FILE] = pd.Categorical.from_codes(numbers, pd.Index(names))
    table[ROW] = np.concatenate([np.arange(len(part)) for part in parts])
    return table


def choose_bands(
    present: Sequence[str] | None, planes: int, asked: Sequence[str]
) -> tuple[list[int], tuple[str, ...]]:
    """Which planes of an image to take, and their names.

    Args:
        present: the names that the survey gives its planes; none where it does not.
        planes: how many there are.
        asked: the bands to take, in order; all if empty. Planes without names are known by their
            numbers from 1 on, and as many names as there are planes name them.

    Raises:
        BadImageError: the planes are others.
    """
    names = list(present) if present else [str(i + 1) for i in range(planes)]
    if len(names) != planes:
        raise BadImageError(f"has {planes} planes and {len(names)} names of bands")
    if not asked:
        return list(range(planes)), tuple(names)
    if all(band in names for band in asked):
        return [names.index(band) for band in asked], tuple(asked)
    if present is None and len(asked) == planes:
        return list(range(planes)), tuple(asked)
    known = f"bands {' '.join(names)}" if present else f"{planes} bands without names"
    raise BadImageError(f"has {known}, not {' '.join(asked)}")
