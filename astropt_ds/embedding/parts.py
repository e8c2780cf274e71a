"""The parts of a table in the making: each appears whole, with a record of what became of whom."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from astropt_ds.embedding.galaxies import Failure
from astropt_ds.files import sha256_file, sync_file, sync_folder, write_durably
from astropt_ds.table.formats import FORMATS, text_widths

RECORDS = "_parts"


@dataclass(frozen=True)
class Record:
    """What became of the galaxies of a part; the part is finished when its record is there.

    Attributes:
        rows: galaxies that have an embedding.
        bytes, sha256: of the part's file.
        failures: the others.
    """

    rows: int
    bytes: int
    sha256: str
    failures: list[Failure]

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

    def is_to_be_done_again(self, part: int) -> bool:
        """Whether a finished part's file is gone, or galaxies in it could not be looked at."""
        record = self.record(part)
        if record is None:
            return False  # another task has seen to it
        try:
            whole = self.file(part).stat().st_size == record.bytes
        except FileNotFoundError:
            whole = False
        return bool(record.unreachable) or not whole

    def reopen(self, part: int) -> None:
        """Forget a part, so that it is done again."""
        self._record(part).unlink(missing_ok=True)

    def commit(self, part: int, table: pa.Table, failures: Sequence[Failure]) -> None:
        """Write a part, and then its record. Where another task was faster, its part stays.

        Raises:
            OSError: it cannot be written.
        """
        if self._record(part).exists():
            return
        path = self.file(part)
        mine = uuid.uuid4().hex  # should another task be at the same part after all
        partial = path.with_name(f"_{path.stem}.{mine}{path.suffix}")
        try:
            widths = text_widths(table)
            with self.format.create(partial, table.schema, table.num_rows, widths) as writer:
                writer.write(table)
            sync_file(partial)
            size, digest = partial.stat().st_size, sha256_file(partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(self.folder)
        record = Record(table.num_rows, size, digest, list(failures))
        partial = self.folder / RECORDS / f"{path.stem}.{mine}.partial"
        write_durably(partial, json.dumps(asdict(record)))
        partial.rename(self._record(part))
        sync_folder(partial.parent)

    def sweep(self) -> None:
        """Remove what tasks that were killed have left half written."""
        for path in (*self.folder.glob("_part-*"), *(self.folder / RECORDS).glob("*.partial")):
            path.unlink(missing_ok=True)

    def _record(self, part: int) -> Path:
        return self.folder / RECORDS / (self.name(part) + ".json")
