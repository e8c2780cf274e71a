"""Parquet files with a column of images, as the Hugging Face hub keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from astropt_ds.data.decode import BadImageError
from astropt_ds.errors import UserError, one_line
from astropt_ds.ingest.cells import id_column, texts
from astropt_ds.ingest.source import (
    FILE,
    ID,
    RGB,
    ROW,
    Facts,
    Needed,
    Picture,
    Row,
    common_base,
    each_readable,
    find_files,
    first_readable,
    stack,
)

BATCH = 64  # rows in memory at once: images of a megabyte each are nothing to worry about
# Integers with gaps keep their digits: as floats they would lose those beyond 2 ** 53.
NULLABLE = {
    pa.type_for_alias(name.lower()): getattr(pd, f"{name}Dtype")()
    for name in ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")
}


def to_frame(table: pa.Table) -> pd.DataFrame:
    """An Arrow table as a pandas one that keeps every digit and every column."""
    frame: pd.DataFrame = table.to_pandas(types_mapper=NULLABLE.get, ignore_metadata=True)
    return frame


def column_names(schema: pa.Schema) -> list[str]:
    """The columns of a file, without the row numbers that pandas adds where it wrote it."""
    return [name for name in schema.names if not name.startswith("__index_level_")]


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files and folders of them.

    Args:
        paths: files, or folders that are searched for ``*.parquet``.
        image_column: ``{bytes, path}`` as the hub has it, or bytes.
        named_id: the column of the ids; the first of the usual ones if None.
        labels: the columns to keep as labels; all if empty.
    """

    paths: tuple[Path, ...]
    image_column: str = "image"
    named_id: str | None = None
    labels: tuple[str, ...] = ()
    sequential: ClassVar[bool] = True
    unreadable: list[tuple[str, str]] = field(default_factory=list, init=False, compare=False)

    @cached_property
    def base(self) -> Path:
        """The folder that file names are relative to."""
        return common_base(self.paths)

    @cached_property
    def id_column(self) -> str:
        """Of the ids among the columns."""
        return id_column(self.named_id, self.columns, "id-column", str(self.files()[0]))

    @cached_property
    def columns(self) -> list[str]:
        """What is said about an image, in the first file."""
        return self._about(first_readable(self.files(), _open).schema_arrow)

    @cached_property
    def left_out(self) -> list[str]:
        """Other columns of images."""
        schema = first_readable(self.files(), _open).schema_arrow
        return [f.name for f in schema if _holds_images(f.type) and f.name != self.image_column]

    def files(self) -> list[Path]:
        """The Parquet files."""
        return find_files(self.paths, (".parquet",), "--parquet")

    def count(self, file: Path) -> int:
        """How many images a file holds."""
        return int(_open(file).metadata.num_rows)

    def table(self, needed: Needed) -> pd.DataFrame:
        """A row an image. Only the columns needed are read."""
        wanted = list(dict.fromkeys([self.id_column, *filter(needed, self.columns)]))
        parts = {}
        for path, file in each_readable(self.files(), _open, self.unreadable):
            part = self._read_columns(file, path, wanted)
            part[ID] = texts(part[self.id_column], self.id_column, str(path))
            parts[path] = part
        return stack(list(parts.values()), list(parts), self.base)

    def state(self, rows: pd.DataFrame) -> str:
        """Nothing: :meth:`files` tells."""
        return ""

    def facts(self, table: pd.DataFrame) -> Facts:
        """8-bit colour."""
        return RGB

    def read(
        self, rows: pd.DataFrame, facts: Facts
    ) -> Iterator[tuple[Row, Picture | BadImageError]]:
        """Each row with the bytes of its image, read by batches of the row groups that hold any."""
        for name, part in rows.groupby(FILE, observed=True, sort=False):
            waiting = {row[ROW]: row for row in part.to_dict("records")}
            try:
                file = pq.ParquetFile(self.base / str(name))
                for group, start in _row_groups(file, np.array(sorted(waiting))):
                    yield from self._read_group(file, group, start, waiting)
            except (OSError, pa.ArrowException) as error:
                for row in waiting.values():
                    yield row, BadImageError(f"cannot be read ({one_line(error)})")

    def _read_group(
        self, file: pq.ParquetFile, group: int, start: int, waiting: dict[int, Row]
    ) -> Iterator[tuple[Row, Picture | BadImageError]]:
        """Of the rows that wait, those in a row group, which starts at row ``start``."""
        columns = [c for c in self._about(file.schema_arrow) if not self.labels or c in self.labels]
        stop = start + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(
                BATCH, row_groups=[group], columns=[self.image_column, *columns], use_threads=False
            ):
                here = [i for i in range(len(batch)) if start + i in waiting]
                chosen = batch.take(pa.array(here, pa.int64()))
                images = chosen.column(self.image_column).to_pylist()
                labels = chosen.select(columns).to_pylist() if columns else [{}] * len(here)
                for i, image, beside in zip(here, images, labels, strict=True):
                    data = image["bytes"] if isinstance(image, dict) else image
                    row = waiting.pop(start + i)
                    yield row, Picture(data, beside) if data else BadImageError("has no image")
                start += len(batch)
                if not any(start <= n < stop for n in waiting):
                    break  # what is left of the group is nobody's
        except (OSError, pa.ArrowException) as error:
            for number in [n for n in waiting if start <= n < stop]:
                yield waiting.pop(number), BadImageError(f"cannot be read ({one_line(error)})")

    def _about(self, schema: pa.Schema) -> list[str]:
        return [
            name
            for name in column_names(schema)
            if name != self.image_column and not _holds_images(schema.field(name).type)
        ]

    def _read_columns(self, file: pq.ParquetFile, path: Path, columns: list[str]) -> pd.DataFrame:
        schema = file.schema_arrow
        for option, column in [("image", self.image_column), *(("id", c) for c in columns)]:
            if column not in schema.names:
                raise UserError(
                    f"--{option}-column {column}: {path} has no such column; "
                    f"it has {', '.join(schema.names)}"
                )
        kind = schema.field(self.image_column).type
        if not (_holds_images(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise UserError(
                f"--image-column {self.image_column}: {path} holds {kind} there; "
                "the bytes of image files would be right"
            )
        try:
            return to_frame(file.read(columns))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)})") from None


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None


def _holds_images(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _row_groups(file: pq.ParquetFile, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """(number, first row) of the row groups that hold any of these rows."""
    counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    starts = np.cumsum([0, *counts])
    for group in np.unique(np.searchsorted(starts, rows, side="right") - 1).tolist():
        yield group, int(starts[group])
