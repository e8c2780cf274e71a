"""What a complete table says of itself: ``_manifest.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from astropt_ds.errors import UserError
from astropt_ds.files import replace_durably

MANIFEST, FAILURES = "_manifest.json", "_failures.csv"
FORMAT = "astropt_ds-embeddings-1"


class PartEntry(BaseModel):
    """A file of the table."""

    model_config = ConfigDict(extra="forbid")

    name: str
    rows: int
    bytes: int
    sha256: str


class TableManifest(BaseModel):
    """What ``_manifest.json`` holds.

    Attributes:
        file_format: of the parts.
        rows: galaxies that have an embedding.
        asked: galaxies that were to have one.
        failures: how many have none, by reason.
        unreachable: of those, how many could not be looked at, and may be another time.
        unlisted: galaxies that the catalogue beside them does not know.
        duplicates: rows beyond the first of each id.
        duplicated: some of those ids.
        facts: how the embeddings were made.
    """

    model_config = ConfigDict(extra="forbid")

    format: str = FORMAT
    file_format: str
    rows: int
    asked: int
    failures: dict[str, int] = {}
    unreachable: int = 0
    unlisted: int = 0
    duplicates: int = 0
    duplicated: list[str] = []
    facts: dict[str, Any] = {}
    parts: list[PartEntry]

    def save(self, folder: Path) -> None:
        """Write the manifest in place of one that is there."""
        replace_durably(folder / MANIFEST, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> TableManifest:
        """The manifest of a table.

        Raises:
            UserError: there is none, or it is damaged or of another format.
        """
        path = folder / MANIFEST
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); a table that tools/embed.py has "
                "finished has one, and the same command finishes it"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: not a table's ({key or 'JSON'}: {first['msg']})") from None
        if manifest.format != FORMAT:
            raise UserError(f"{path}: format {manifest.format!r}; {FORMAT!r} would be right")
        return manifest
