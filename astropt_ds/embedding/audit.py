"""The end of a table: every galaxy accounted for, the index, the list of failures, the manifest."""

from __future__ import annotations

import csv
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from astropt_ds.embedding.claims import Claims
from astropt_ds.embedding.parts import RECORDS, Parts, Record
from astropt_ds.embedding.plan import Plan
from astropt_ds.errors import UserError
from astropt_ds.files import replacing
from astropt_ds.table.formats import Files
from astropt_ds.table.index import INDEX, write_index
from astropt_ds.table.manifest import FAILURES, FORMAT, MANIFEST, PartEntry, TableManifest

REASONS = 50  # that are counted apart
MISSING = "is not in the data"
WAIT_S = 0.5


def finish(plan: Plan, parts: Parts, claims: Claims, missing: list[str]) -> TableManifest:
    """The manifest of a table whose parts are all there, written by whichever task comes first.

    Args:
        plan: of the table.
        parts: its own.
        claims: of this task.
        missing: ids that were asked for and are not in the data.

    Raises:
        UserError: galaxies are not accounted for.
    """
    while (manifest := current(parts)) is None:
        if claims.take("manifest"):
            try:
                manifest = current(parts) or _write(plan, parts, missing)
            finally:
                claims.release("manifest")
            return manifest
        time.sleep(WAIT_S)
    return manifest


def current(parts: Parts) -> TableManifest | None:
    """The manifest, unless a part was written after it, or the index is gone."""
    try:
        written = (parts.folder / MANIFEST).stat().st_mtime_ns
        (parts.folder / INDEX).stat()
    except FileNotFoundError:
        return None
    with os.scandir(parts.folder / RECORDS) as records:
        newest = max((record.stat().st_mtime_ns for record in records), default=0)
    return TableManifest.load(parts.folder) if written >= newest else None


def verdict(manifest: TableManifest, folder: Path) -> None:
    """Complain of a table that is not what was asked for.

    Raises:
        UserError: an id is there twice, galaxies could not be looked at, or none has an embedding.
    """
    listed = folder / FAILURES
    if manifest.duplicates:
        raise UserError(
            f"{folder}: {manifest.duplicates} ids are there more than once, "
            f"{manifest.duplicated[0]!r} for one; an id of its own for each galaxy would be right"
        )
    if manifest.unreachable:
        raise UserError(
            f"{folder}: {manifest.unreachable} galaxies could not be looked at ({listed}); the "
            "same command tries them again"
        )
    if not manifest.rows:
        reason = next(iter(manifest.failures), "")
        raise UserError(f"{folder}: none of {manifest.asked} galaxies is embedded; one {reason}")


def _write(plan: Plan, parts: Parts, missing: list[str]) -> TableManifest:
    reasons: Counter[str] = Counter()
    whole: dict[str, str] = {}  # the reason that all of a kind share
    entries, files = [], []
    unreachable = unlisted = 0
    with (
        replacing(parts.folder / FAILURES) as partial,
        partial.open("w", newline="", errors="backslashreplace") as output,
    ):
        listed = csv.writer(output)
        listed.writerow(("id", "file", "reason"))
        for part, record in _records(plan, parts):
            file = parts.file(part)
            rows = parts.format.open(file).rows
            if rows != record.rows:
                raise UserError(f"{file}: {rows} rows, not the {record.rows} of its record")
            entries.append(
                PartEntry(
                    name=file.name, rows=record.rows, bytes=record.bytes, sha256=record.sha256
                )
            )
            files.append(file)
            listed.writerows(failure[:3] for failure in record.failures)
            for failure in record.failures:
                kind = _kind(failure.reason)
                reasons[kind] += 1
                if whole.setdefault(kind, failure.reason) != failure.reason:
                    whole[kind] = kind
            unreachable += record.unreachable
            unlisted += record.unlisted
        listed.writerows((identifier, "", MISSING) for identifier in missing)
        if missing:
            reasons[MISSING], whole[MISSING] = len(missing), MISSING
    duplicates = write_index(parts.folder, Files(parts.format, files))
    counted = {whole[kind]: count for kind, count in reasons.most_common(REASONS)}
    if rest := reasons.total() - sum(counted.values()):
        counted["others"] = rest
    manifest = TableManifest(
        format=FORMAT,
        file_format=parts.format.name,
        rows=sum(entry.rows for entry in entries),
        asked=plan.rows + len(missing),
        failures=counted,
        unreachable=unreachable,
        unlisted=unlisted,
        duplicates=duplicates.count,
        duplicated=duplicates.ids,
        parts=entries,
        facts=plan.facts,
    )
    manifest.save(parts.folder)
    parts.sweep()
    return manifest


def _records(plan: Plan, parts: Parts) -> Iterator[tuple[int, Record]]:
    """The record of each part.

    Raises:
        UserError: one is not there, or does not account for all galaxies of its part.
    """
    for part in range(plan.parts):
        first, stop = plan.bounds(part)
        record = parts.record(part)
        known = record.rows + len(record.failures) if record else 0
        if record is None or known != stop - first:
            raise UserError(
                f"{parts.folder}: {parts.name(part)} accounts for {known} of {stop - first} "
                "galaxies; the same command would be right"
            )
        yield part, record


def _kind(reason: str) -> str:
    """A reason without its numbers, so that it can be counted."""
    return re.sub(r"\d+", "N", reason)
