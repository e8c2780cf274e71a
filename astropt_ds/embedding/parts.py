"""The parts of a table in the making: each appears whole, with a record of what became of whom."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from astropt_ds.embedding.galaxies import Failure
from astropt_ds.files import replace_durably, replacing, sha256_file, sweep
from astropt_ds.table.formats import FORMATS, text_widths
from astropt_ds.table.index import SCRATCH

RECORDS = "_parts"
State: TypeAlias = tuple[int, int] | None  # of a record: what changes when it is written anew


@dataclass(frozen=True)
class Record:
    """What became of the galaxies of a part; the part is finished when its record is there.

    Attributes:
        rows: galaxies that have an embedding.
        bytes, sha256: of the part's file.
        failures: the others.
        unlisted: galaxies that the catalogue does not know.
    """

    rows: int
    bytes: int
    sha256: str
    failures: list[Failure]
    unlisted: int = 0

    @property
    def unreachable(self) -> int:
        """Galaxies that could not be looked at."""
        return sum(failure.unreachable for failure in self.failures)


class Parts:
    """The parts of a table in a folder, and their records.

    Args:
        folder: of the table.
        file_format: of the parts: a name in FORMATS.
    """

    def __init__(self, folder: Path, file_format: str) -> None:
        self.folder = folder
        self.format = FORMATS[file_format]
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)

    def name(self, part: int) -> str:
        """Of a part, in claims and, with the format's suffix, of its file."""
        return f"part-{part:06d}"

    def file(self, part: int) -> Path:
        """Of a part."""
        return self.folder / (self.name(part) + self.format.suffix)

    def finished(self) -> set[int]:
        """The numbers of the parts that have a record."""
        names = os.listdir(self.folder / RECORDS)
        return {int(name[5:-5]) for name in names if name.endswith(".json")}

    def record(self, part: int) -> Record | None:
        """What became of a part; None if it is not finished."""
        try:
            values = json.loads(self._record(part).read_text())
        except FileNotFoundError:
            return None
        failures = [Failure(*failure) for failure in values.pop("failures")]
        return Record(**values, failures=failures)

    def lacking(self) -> dict[int, State]:
        """The finished parts whose file is gone, or in which galaxies could not be looked at.

        Returns:
            The state of each one's record: another means that somebody has done it again.
        """
        found = {}
        for part in self.finished():
            state, record = self.state(part), self.record(part)
            if record and (record.unreachable or not self._is_whole(part, record)):
                found[part] = state
        return found

    def state(self, part: int) -> State:
        """Of a part's record; None if there is none."""
        try:
            stat = self._record(part).stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def commit(
        self, part: int, table: pa.Table, failures: Sequence[Failure], unlisted: int
    ) -> None:
        """Write a part, and then its record, in place of those that may be there.

        Raises:
            OSError: it cannot be written.
        """
        widths = text_widths(table)
        with replacing(self.file(part)) as partial:
            with self.format.create(partial, table.schema, table.num_rows, widths) as writer:
                writer.write(table)
            size, digest = partial.stat().st_size, sha256_file(partial)
        record = Record(table.num_rows, size, digest, list(failures), unlisted)
        replace_durably(self._record(part), json.dumps(asdict(record)))

    def sweep(self) -> None:
        """Remove what tasks that were killed have left half written."""
        for folder in (self.folder, self.folder / RECORDS):
            sweep(folder)
        for path in self.folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _is_whole(self, part: int, record: Record) -> bool:
        try:
            return self.file(part).stat().st_size == record.bytes
        except FileNotFoundError:
            return False

    def _record(self, part: int) -> Path:
        return self.folder / RECORDS / (self.name(part) + ".json")
