"""Small tables, and folders of them as tools/embed.py leaves them."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from astropt_ds.files import sha256_file
from astropt_ds.table.formats import FORMATS, Files, text_widths
from astropt_ds.table.index import write_index
from astropt_ds.table.manifest import PartEntry, TableManifest
from astropt_ds.table.schema import table_schema

FACTS = {"model": "ab" * 32, "layers": [2], "pooling": "mean", "tokens": 64}
COLUMNS = {"ra": pa.float64(), "number": pa.int64(), "kind": pa.string()}
BIG = 2**60 + 1  # no float holds it


def galaxy_table(ids, width=4, shape=None, dtype="float32"):
    """A row an id; the first value of its embedding and its number tell which."""
    shape = shape or (width,)
    schema = table_schema(COLUMNS, {"embedding": shape}, dtype, FACTS)
    rows = len(ids)
    values = np.arange(rows)[:, None] + np.arange(np.prod(shape)) / 16
    lists = pa.FixedSizeListArray.from_arrays(
        pa.array(values.astype(dtype).reshape(-1)), int(np.prod(shape))
    )
    columns = [
        pa.array(ids, pa.string()),
        pa.array([None if i % 5 == 2 else i / 8 for i in range(rows)], pa.float64()),
        pa.array([None if i % 5 == 3 else BIG + i for i in range(rows)], pa.int64()),
        pa.array([None if i % 5 == 4 else "ab"[i % 2] for i in range(rows)], pa.string()),
        lists,
    ]
    return pa.table(columns, schema=schema)


def write_folder(folder: Path, table: pa.Table, parts: int = 3, name: str = "parquet") -> Path:
    """A complete table."""
    folder.mkdir()
    form, paths, entries = FORMATS[name], [], []
    cuts = np.linspace(0, len(table), parts + 1).astype(int).tolist()
    for number in range(parts):
        piece = table.slice(cuts[number], cuts[number + 1] - cuts[number])
        path = folder / f"part-{number:06d}{form.suffix}"
        with form.create(path, piece.schema, len(piece), text_widths(piece)) as writer:
            writer.write(piece)
        paths.append(path)
        size = path.stat().st_size
        entries.append(
            PartEntry(name=path.name, rows=len(piece), bytes=size, sha256=sha256_file(path))
        )
    write_index(folder, Files(form, paths))
    TableManifest(
        file_format=name, rows=len(table), asked=len(table), facts=FACTS, parts=entries
    ).save(folder)
    return folder
