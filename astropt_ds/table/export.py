"""A table in another format, as one file or in parts; part by part, so that any size passes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from astropt_ds.errors import UserError
from astropt_ds.files import sha256_file, staged, sync_file
from astropt_ds.table.formats import FORMATS, Files, Format, Stored, text_widths
from astropt_ds.table.index import write_index
from astropt_ds.table.manifest import FAILURES, MANIFEST, PartEntry, TableManifest
from astropt_ds.table.read import chosen, open_parts, schema_of
from astropt_ds.table.schema import ID, check_types, facts_of, recast, row_bytes

PIECE_ROWS, PIECE_BYTES = 16_384, 64_000_000  # of embeddings, that are in memory at once


def export(
    table: Path, output: Path, file_format: str | None = None, columns: Sequence[str] | None = None
) -> int:
    """Write a table anew; the output appears whole, or not at all.

    Args:
        table: a table's folder, or a file.
        output: a file, whose suffix names its format, or else a folder of parts.
        file_format: of a folder's parts: a name in FORMATS.
        columns: to keep beside the id; all if None.

    Returns:
        Rows written.

    Raises:
        UserError: there is no such table, the format cannot hold it, or the output cannot be
            written.
    """
    stored = open_parts(table)
    whole = schema_of(table, stored)
    names = chosen(table, whole, columns) or list(dict.fromkeys([ID, *whole.names]))
    schema = pa.schema([whole.field(name) for name in names], whole.metadata)
    check_types(table, schema)
    suffixes = {form.suffix: form for form in FORMATS.values()}
    single = suffixes.get(output.suffix)
    if single and file_format not in (None, single.name):
        raise UserError(f"--output {output}: is {single.name} by its name, not {file_format}")
    if not single and file_format is None:
        known = ", ".join(suffixes)
        raise UserError(f"--output {output}: a name with {known}, or --format, would be right")
    try:
        with staged(output) as staging:
            if single:
                _write(stored, staging, single, schema)
            else:
                staging.mkdir()
                _write_parts(table, stored, staging, FORMATS[str(file_format)], schema)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output {output}: cannot be written ({reason})") from None
    return sum(part.rows for part in stored)


def _write(stored: Sequence[Stored], path: Path, form: Format, schema: pa.Schema) -> None:
    """Files as one file."""
    schema = form.fit(schema)
    widths: dict[str, int] = {}
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    for piece in _pieces(stored, texts):  # some formats must know beforehand how long texts are
        for name, width in text_widths(piece).items():
            widths[name] = max(width, widths.get(name, 1))
    rows = sum(part.rows for part in stored)
    with form.create(path, schema, rows, widths) as writer:
        for piece in _pieces(stored, schema.names):
            writer.write(recast(piece, schema))
    sync_file(path)


def _pieces(stored: Sequence[Stored], names: list[str]) -> Iterator[pa.Table]:
    """Some columns of all rows, no more at once than fit in memory: a file may hold them all."""
    for part in stored:
        step = max(1, min(PIECE_ROWS, PIECE_BYTES // max(1, row_bytes(part.schema))))
        for first in range(0, part.rows, step):
            yield part.read(names, np.arange(first, min(part.rows, first + step)))


def _write_parts(
    table: Path, stored: Sequence[Stored], folder: Path, form: Format, schema: pa.Schema
) -> None:
    """Each file as one of another format, with an index and a manifest."""
    entries = []
    for number, part in enumerate(stored):
        path = folder / f"part-{number:06d}{form.suffix}"
        _write([part], path, form, schema)
        size, digest = path.stat().st_size, sha256_file(path)
        entries.append(PartEntry(name=path.name, rows=part.rows, bytes=size, sha256=digest))
    duplicates = write_index(folder, Files(form, [folder / entry.name for entry in entries]))
    if (table / MANIFEST).is_file():
        manifest = TableManifest.load(table)
        if (listed := table / FAILURES).is_file():
            shutil.copy(listed, folder)
    else:
        rows, facts = sum(part.rows for part in stored), facts_of(schema)
        manifest = TableManifest(
            file_format=form.name, rows=rows, asked=rows, facts=facts, parts=[]
        )
    found = {"duplicates": duplicates.count, "duplicated": duplicates.ids}
    manifest = manifest.model_copy(update={"file_format": form.name, "parts": entries, **found})
    manifest.save(folder)
