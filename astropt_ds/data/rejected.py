"""What is left out of a data set: counted, and listed with its reason beside the shards."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

REJECTED = "rejected.csv"


class Rejected(NamedTuple):
    """An image that cannot be used."""

    id: str
    file: str  # where it lies
    reason: str


def write_rejected(folder: Path, rejected: Iterable[Rejected]) -> None:
    """List what was left out, one row an image."""
    # a name may be no UTF-8
    with (folder / REJECTED).open("w", newline="", errors="backslashreplace") as output:
        csv.writer(output).writerows([Rejected._fields, *rejected])
