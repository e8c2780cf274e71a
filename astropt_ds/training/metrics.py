"""metrics.jsonl, one JSON object a line: each record whole and once, whatever ends the run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from astropt_ds.config import Config
from astropt_ds.errors import UserError
from astropt_ds.files import replace_durably
from astropt_ds.training.trackers import Trackers

METRICS = "metrics.jsonl"


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Metrics:
    """The record of a run. Made on rank 0 only.

    A full disk costs no record: they wait in memory and are written, in order, with the next one.

    Args:
        folder: the run's folder.
        step: records beyond this step are dropped: a resumed run makes them again.
        config: the run's.
        warn: is told, in one line, when the disk or a tracker fails, and when the disk is back.

    Raises:
        UserError: metrics.jsonl holds a line that is no record, or cannot be written; or a tracker
            that the configuration asks for cannot be started.
    """

    def __init__(
        self, folder: Path, step: int, config: Config, warn: Callable[[str], None] = _warn
    ) -> None:
        self.path = folder / METRICS
        kept = [line for line, r in _records(self.path) if step > 0 and r["step"] <= step]
        self._warn = warn
        self._trackers = Trackers(folder, step, config, warn)
        try:
            replace_durably(self.path, "".join(f"{line}\n" for line in kept))
            # not "ab": where a file is opened to append, Linux ignores the position of pwrite
            self._file = self.path.open("r+b", buffering=0)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error})") from None
        self._length = self.path.stat().st_size  # bytes of whole records
        self._waiting: list[bytes] = []  # lines that are not in the file yet
        self._unsynced: list[bytes] = []  # lines that are, but perhaps not on the disk
        self._lock = threading.Lock()  # a save syncs in a thread of its own
        self._failure: OSError | None = None

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a record; None stands for what is not known."""
        record = {"kind": kind, "step": step, **values, "time": time.time()}
        with self._lock:
            self._waiting.append(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._write_waiting()
        if kind != "event":
            self._trackers.log(kind, step, values)

    def sync(self) -> None:
        """Return when all records so far are on the disk.

        Raises:
            UserError: they are not; those since the last sync wait to be written again.
        """
        with self._lock:
            self._write_waiting()
            written = len(self._unsynced)
            failure = self._failure
        try:
            if failure:
                raise failure
            os.fsync(self._file.fileno())
        except OSError as error:
            # on a network's file system a full disk shows here, and once
            with self._lock:
                self._waiting = self._unsynced + self._waiting
                self._length -= sum(map(len, self._unsynced))
                self._unsynced = []
            raise UserError(f"{self.path}: cannot be written ({error})") from None
        with self._lock:
            del self._unsynced[:written]

    def close(self, failed: bool = False) -> None:
        """Write what still waits, and end the trackers.

        Args:
            failed: the run did not end as it should. Its own error is what the user wants to see,
                so missing records are only warned of.

        Raises:
            UserError: records are missing, since they still cannot be written.
        """
        if self._waiting:
            self._write_waiting()
        self._file.close()
        self._trackers.close(failed)
        if self._waiting:
            missing = f"the last {len(self._waiting)} records are missing ({self._failure})"
            if not failed:
                raise UserError(f"{self.path}: {missing}")
            self._warn(f"{self.path}: {missing}")

    def _write_waiting(self) -> None:
        data = b"".join(self._waiting)
        written = 0
        try:
            while written < len(data):  # a disk that is nearly full takes a part
                position = self._length + written
                written += os.pwrite(self._file.fileno(), data[written:], position)
        except OSError as error:
            if self._failure is None:
                self._warn(f"{self.path}: cannot be written ({error}); records wait in memory")
            self._failure = error
            with contextlib.suppress(OSError):  # else the next attempt writes over the torn line
                os.ftruncate(self._file.fileno(), self._length)
            return
        if self._failure is not None:
            self._warn(f"{self.path}: is written again, no record is missing")
        self._failure = None
        self._length += len(data)
        self._unsynced += self._waiting
        self._waiting = []


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All records of a run, in order; a last line torn by a crash is left out.

    Raises:
        UserError: a line is no record.
    """
    return [record for _, record in _records(Path(folder) / METRICS)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole line with what it says."""
    data = path.read_bytes() if path.is_file() else b""
    lines = data.split(b"\n")[:-1]  # what follows the last line end is torn
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            raise UserError(
                f"{path}: line {number} is no record of a run; to mend or remove it would be right"
            )
        yield line.decode(), record
