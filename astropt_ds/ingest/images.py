"""A folder of JPEG and PNG files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd

from astropt_ds.data.decode import BadImageError
from astropt_ds.errors import UserError
from astropt_ds.ingest.source import (
    FILE,
    ID,
    RGB,
    Facts,
    Needed,
    Picture,
    Row,
    files_below,
    state_of,
)

SUFFIXES = (".jpg", ".jpeg", ".png")
OTHERS = (".gif", ".webp", ".tif", ".tiff", ".bmp", ".jp2", ".fits")


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder; an image's id is its path without the suffix.

    Raises:
        UserError: there is no such folder.
    """

    base: Path
    id_column: ClassVar[str] = "id"
    columns: ClassVar[tuple[str, ...]] = ()
    unreadable: ClassVar[tuple[tuple[str, str], ...]] = ()
    sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.base.is_dir():
            raise UserError(f"--images {self.base}: is no folder")

    def table(self, needed: Needed) -> pd.DataFrame:
        """A row an image."""
        names = files_below(self.base, SUFFIXES)
        ids = [str(Path(name).with_suffix("")) for name in names]
        return pd.DataFrame({ID: ids, FILE: names}, dtype=str)

    @property
    def left_out(self) -> list[str]:
        """Images of kinds that shards do not hold."""
        return files_below(self.base, OTHERS)

    def files(self) -> list[Path]:
        """None holds many."""
        return []

    def count(self, file: Path) -> int:
        """One."""
        return 1

    def state(self, rows: pd.DataFrame) -> str:
        """Of the files named by some rows."""
        return state_of(self.base / file for file in rows[FILE].dropna())

    def facts(self, table: pd.DataFrame) -> Facts:
        """8-bit colour."""
        return RGB

    def read(
        self, rows: pd.DataFrame, facts: Facts
    ) -> Iterator[tuple[Row, Picture | BadImageError]]:
        """Each row with the bytes of its file."""
        for row in rows.to_dict("records"):
            file = row[FILE]
            suffix = Path(file).suffix.lower()
            try:
                data = (self.base / file).read_bytes()
            except OSError as error:
                yield row, BadImageError(str(error.strerror))
                continue
            yield row, Picture(data, {}, suffix[1:] if suffix in SUFFIXES else None)
