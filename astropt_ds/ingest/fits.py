"""A folder of FITS images: a file an object, or a file a band of an object.

In one file the bands are its two-dimensional images, named by EXTNAME, FILTER or BAND, whichever
all of them have, or the planes of its one image of three dimensions, which have no names.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from astropt_ds.data.decode import BadImageError
from astropt_ds.errors import UserError, one_line
from astropt_ds.extras import optional
from astropt_ds.ingest.source import (
    FILE,
    ID,
    Facts,
    Needed,
    Picture,
    Row,
    choose_bands,
    files_below,
    spread,
    state_of,
)

SUFFIXES = (".fits", ".fit", ".fits.gz", ".fits.fz")
NAMES = ("EXTNAME", "FILTER", "BAND")
COMPRESSED = "COMPRESSED_IMAGE"  # what fpack calls images that had no name
BAND = "{band}"


@dataclass(frozen=True)
class FitsFolder:
    """The FITS images below a folder.

    Args:
        base: the folder.
        bands: which to take, in order; all if empty. They name those that have no names.
        pattern: the path of a band's file, with ``{id}`` and ``{band}`` in it; a file holds all
            bands of an object if None.

    Raises:
        UserError: there is no such folder.
    """

    base: Path
    bands: tuple[str, ...] = ()
    pattern: str | None = None
    id_column: ClassVar[str] = "id"
    columns: ClassVar[tuple[str, ...]] = ()
    sequential: ClassVar[bool] = False
    unreadable: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __post_init__(self) -> None:
        optional("astropy.io.fits", "--fits")
        if not self.base.is_dir():
            raise UserError(f"--fits {self.base}: is no folder")

    def table(self, needed: Needed) -> pd.DataFrame:
        """A row an object, whose id is the file's path without the suffix, or what the pattern
        finds in it."""
        names = files_below(self.base, SUFFIXES)
        if self.pattern is None:
            return pd.DataFrame({ID: [_stem(name) for name in names], FILE: names}, dtype=str)
        expression = self._expression()
        found = {m["id"]: None for name in names if (m := expression.fullmatch(name))}
        return pd.DataFrame({ID: list(found), FILE: [self.place(i) for i in found]}, dtype=str)

    @property
    def left_out(self) -> list[str]:
        """Files that the pattern does not fit."""
        if self.pattern is None:
            return []
        expression, names = self._expression(), files_below(self.base, SUFFIXES)
        return [name for name in names if not expression.fullmatch(name)]

    def place(self, identifier: str) -> str:
        """Where the pattern says that an object's bands lie, ``{band}`` left in it."""
        return str(self.pattern).replace("{id}", identifier)

    def _expression(self) -> re.Pattern[str]:
        bands = "|".join(map(re.escape, self.bands))
        text = re.escape(str(self.pattern))
        text = text.replace(re.escape("{id}"), "(?P<id>.+)", 1)
        text = text.replace(re.escape("{id}"), "(?P=id)")
        return re.compile(text.replace(re.escape(BAND), f"(?:{bands})"))

    def files(self) -> list[Path]:
        """None holds many."""
        return []

    def count(self, file: Path) -> int:
        """One."""
        return 1

    def state(self, rows: pd.DataFrame) -> str:
        """Of the files named by some rows, a file a band where there is a pattern."""
        bands = self.bands if self.pattern else ("",)
        names = rows[FILE].dropna()
        return state_of(self.base / name.replace(BAND, band) for name in names for band in bands)

    def facts(self, table: pd.DataFrame) -> Facts:
        """The bands that most of some objects have."""
        reasons = []
        found: Counter[tuple[str, ...]] = Counter()
        for file in spread(table[table[FILE].notna()])[FILE]:
            try:
                found[self._read_object(file)[1]] += 1
            except BadImageError as error:
                reasons.append(f"{file}: {error}")
        if found:
            return Facts("float32", found.most_common(1)[0][0])
        raise UserError(
            f"--fits {self.base}: none of {len(reasons)} is usable"
            + "".join(f"; the first, {reason}" for reason in reasons[:1])
        )

    def read(
        self, rows: pd.DataFrame, facts: Facts
    ) -> Iterator[tuple[Row, Picture | BadImageError]]:
        """Each row with its pixels, (height, width, channels)."""
        for row in rows.to_dict("records"):
            try:
                pixels, bands = self._read_object(row[FILE])
                if bands != facts.bands:
                    raise BadImageError(
                        f"has bands {' '.join(bands)}; "
                        f"{' '.join(facts.bands)} as the others would be right"
                    )
            except BadImageError as error:
                yield row, error
                continue
            yield row, Picture(pixels, {})

    def _read_object(self, file: str) -> tuple[np.ndarray, tuple[str, ...]]:
        if self.pattern is None:
            stack, names = _read_file(self.base / file)
            planes, bands = choose_bands(names, len(stack), self.bands)
            return _together([stack[plane] for plane in planes]), bands
        images = []
        for band in self.bands:
            try:
                stack, _ = _read_file(self.base / file.replace(BAND, band))
            except BadImageError as error:
                raise BadImageError(f"band {band}: {error}") from None
            if len(stack) != 1:
                raise BadImageError(f"band {band}: holds {len(stack)} images; 1 would be right")
            images.append(stack[0])
        return _together(images), self.bands


def _read_file(path: Path) -> tuple[list[np.ndarray], list[str] | None]:
    """The two-dimensional images of a file, and their names if they have any."""
    fits = optional("astropy.io.fits", "--fits")
    kinds = fits.PrimaryHDU, fits.ImageHDU, fits.CompImageHDU
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers that it mends
            with fits.open(path, memmap=False) as units:
                images = [u for u in units if isinstance(u, kinds) and u.header["NAXIS"] >= 2]
                pixels = [unit.data for unit in images]
    except OSError as error:
        raise BadImageError(error.strerror or f"cannot be read ({one_line(error)})") from None
    except Exception as error:  # astropy raises a dozen kinds on damaged files
        raise BadImageError(f"cannot be read ({one_line(error)})") from None
    if len(pixels) == 1 and pixels[0].ndim == 3:
        return list(pixels[0]), None
    if not pixels:
        raise BadImageError("holds no image")
    if any(image.ndim != 2 for image in pixels):
        raise BadImageError(
            f"holds {len(pixels)} images, not all of two dimensions; "
            "that, or one of three, would be right"
        )
    for keyword in NAMES:
        names = [str(unit.header.get(keyword, "")).strip() for unit in images]
        if len({*names} - {"", COMPRESSED}) == len(names):
            return pixels, names
    return pixels, None


def _together(images: list[np.ndarray]) -> np.ndarray:
    """(height, width, channels) float32, in this machine's byte order."""
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        listed = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise BadImageError(f"has bands of different sizes: {listed}")
    with np.errstate(over="ignore"):  # what is too large for float32 is not finite then
        return np.stack([image.astype(np.float32) for image in images], axis=2)


def _stem(name: str) -> str:
    return name[: -len(next(s for s in SUFFIXES if name.lower().endswith(s)))]
