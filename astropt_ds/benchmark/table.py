"""Tables of embeddings, measured: written, indexed, and read by id in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from astropt_ds.errors import UserError
from astropt_ds.files import sha256_file
from astropt_ds.table.formats import FORMATS, Files, text_widths
from astropt_ds.table.index import write_index
from astropt_ds.table.manifest import PartEntry, TableManifest
from astropt_ds.table.schema import table_schema

PART_ROWS = 16_384
WIDTH = 128  # of the 1m model
IDS = 1000
READ = """
import json, sys, time
import numpy, pandas, pyarrow.parquet
from astropt_ds.table.read import read_embeddings
ids = json.load(open(sys.argv[2]))
start = time.perf_counter()
table = read_embeddings(sys.argv[1], ids=ids, kind="numpy")
taken = time.perf_counter() - start
assert [str(i) for i in table["id"]] == ids
print(taken)
"""


def measure_table(rows: int, scratch: Path) -> dict[str, Any]:
    """Rows a second, memory, and the seconds that 1,000 ids at random take.

    Args:
        rows: synthetic ones, of WIDTH values in float16.
        scratch: an empty folder.
    """
    if rows < PART_ROWS:
        raise UserError(f"--rows {rows}: {PART_ROWS} or more would be right")
    folder, process = scratch / "table", psutil.Process()
    memory: list[int] = []
    start = time.perf_counter()
    for _ in write_table(folder, parts_of(rows, WIDTH, "float16")):
        memory.append(process.memory_info().rss)
    taken = time.perf_counter() - start
    rng = np.random.default_rng(0)
    ids = [f"g{n}" for n in rng.choice(rows, IDS, replace=False).tolist()]
    (scratch / "ids.json").write_text(json.dumps(ids))
    command = [sys.executable, "-c", READ, str(folder), str(scratch / "ids.json")]
    reads = [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    return {
        "rows": rows,
        "gigabytes": sum(path.stat().st_size for path in folder.iterdir()) / 1e9,
        "rows_a_second_written_and_indexed": rows / taken,
        "memory_gb_at_a_tenth_and_most": {
            "a tenth": memory[len(memory) // 10] / 1e9,
            "most": max(memory) / 1e9,
        },
        "seconds_to_read_1000_ids": {"median of 3 processes": float(np.median(reads))},
    }


def parts_of(rows: int, width: int, dtype: str) -> Iterator[pa.Table]:
    """Synthetic parts of a table: random embeddings, ids g0, g1, ..., and positions on the sky."""
    columns = {"ra": pa.float64(), "dec": pa.float64()}
    schema = table_schema(columns, {"embedding": (width,)}, dtype, {})
    for first in range(0, rows, PART_ROWS):
        stop = min(rows, first + PART_ROWS)
        rng = np.random.default_rng(first)
        values = pa.array(rng.standard_normal((stop - first) * width, np.float32).astype(dtype))
        lists = pa.FixedSizeListArray.from_arrays(values, width)
        sky = rng.uniform(0, 360, stop - first), rng.uniform(-90, 90, stop - first)
        yield pa.table([[f"g{n}" for n in range(first, stop)], *sky, lists], schema=schema)


def write_table(folder: Path, parts: Iterable[pa.Table]) -> Iterator[int]:
    """Write a table as tools/embed.py does; yields the rows of each part that is written."""
    folder.mkdir()
    form, entries = FORMATS["parquet"], []
    for number, part in enumerate(parts):
        path = folder / f"part-{number:06d}.parquet"
        with form.create(path, part.schema, len(part), text_widths(part)) as writer:
            writer.write(part)
        size, digest = path.stat().st_size, sha256_file(path)
        entries.append(PartEntry(name=path.name, rows=len(part), bytes=size, sha256=digest))
        yield len(part)
    write_index(folder, Files(form, [folder / entry.name for entry in entries]))
    rows = sum(entry.rows for entry in entries)
    TableManifest(file_format=form.name, rows=rows, asked=rows, parts=entries).save(folder)
