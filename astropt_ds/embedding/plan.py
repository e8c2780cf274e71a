"""What all tasks at one table agree on: the same arguments, and how the work is cut into parts."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from astropt_ds.embedding.claims import Claims
from astropt_ds.errors import UserError
from astropt_ds.files import replace_durably
from astropt_ds.table.schema import TYPES

PLAN = "_job.json"
MOST_ROWS = 16_384  # in a part
MOST_BYTES = 256_000_000  # of a part's embeddings, which are in memory
PARTS = 16  # that a small catalogue is cut into, so that several tasks share it
LEAST_ROWS = 128  # in a part of a small one
KINDS = {str(kind): kind for kind in TYPES}


@dataclass(frozen=True)
class Plan:
    """What a table's folder is begun with.

    Attributes:
        asked: what makes the table what it is, by option; as JSON holds it.
        rows: galaxies asked for.
        part_rows: in a part; the last may have fewer.
        types: names of the Arrow types of the columns that are carried along.
        facts: what the table says of itself.
    """

    asked: dict[str, Any]
    rows: int
    part_rows: int
    types: dict[str, str]
    facts: dict[str, Any]

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-self.rows // self.part_rows)

    def bounds(self, part: int) -> tuple[int, int]:
        """The numbers [first, stop) of a part's galaxies."""
        return part * self.part_rows, min(self.rows, (part + 1) * self.part_rows)

    def galaxies(self, parts: set[int]) -> int:
        """How many some parts have together."""
        last = self.parts - 1
        short = self.part_rows * self.parts - self.rows if last in parts else 0
        return len(parts) * self.part_rows - short

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The types of the columns that are carried along."""
        return {name: KINDS[kind] for name, kind in self.types.items()}


def rows_of_a_part(rows: int, row_bytes: int) -> int:
    """A power of two, so that batches fill parts: then a part is the same whoever computes it.

    Args:
        rows: in all.
        row_bytes: of the embeddings of a galaxy in memory.
    """
    most = min(MOST_ROWS, MOST_BYTES // row_bytes, max(LEAST_ROWS, rows // PARTS))
    return 1 << (max(1, most).bit_length() - 1)


def agree(folder: Path, plan: Plan, claims: Claims) -> Plan:
    """The plan of a folder: this one if it is new.

    Raises:
        UserError: it was begun with other arguments.
    """
    path = folder / PLAN
    while not path.exists():
        if claims.take("plan"):
            if not path.exists():
                replace_durably(path, json.dumps(asdict(plan), indent=1) + "\n")
            claims.release("plan")
        else:
            time.sleep(0.05)
    begun = read_plan(folder)
    before, now = _flat(begun.asked), _flat(json.loads(json.dumps(plan.asked)))
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            raise UserError(
                f"--output {folder}: was begun with {key} {before.get(key)}, not {now.get(key)}; "
                "the same arguments, or a new folder, would be right"
            )
    return begun


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Values by option, those of an option that has several by its name and theirs."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key} ({name})": item for name, item in value.items()}
        else:
            flat[key] = value
    return flat


def read_plan(folder: Path) -> Plan:
    """The plan that a folder was begun with.

    Raises:
        UserError: it is damaged.
    """
    path = folder / PLAN
    try:
        return Plan(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not what tools/embed.py writes ({error}); a new folder would be right"
        ) from None
