"""How long and how much memory a run needs to find its first galaxies among ten million."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from astropt_ds.config_source import load_config
from astropt_ds.data.loader import Galaxies
from astropt_ds.data.manifest import FORMAT, Manifest, ShardEntry, SplitEntry, index_dtype

SAMPLES, SHARD = 10_000_000, 1_000


def measure_startup(scratch: Path) -> dict[str, Any]:
    """Open a data set of ten million samples in a process of its own.

    Returns:
        ``seconds`` to open it and to read the first batch, and ``added_memory_mb``, by which the
        process's peak grew meanwhile.
    """
    _write(scratch)
    command = [sys.executable, "-m", "astropt_ds.benchmark.startup", str(scratch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _write(folder: Path) -> None:
    """A data set whose shards and index are holes in files: a run opens them all the same."""
    rows = np.zeros(SHARD, index_dtype(20))
    splits = {}
    for name, samples in (("train", SAMPLES), ("val", SHARD)):
        path = folder / f"{name}.index.npy"
        np.lib.format.open_memmap(path, "w+", index_dtype(20), (samples,))
        shards = [
            ShardEntry(
                name=f"{name}-{number:06d}.tar",
                samples=SHARD,
                bytes=10240,
                sha256="0" * 64,
                smallest=512,
                index_crc32=zlib.crc32(rows.tobytes()),
            )
            for number in range(samples // SHARD)
        ]
        for shard in shards:
            with (folder / shard.name).open("wb") as file:
                file.truncate(shard.bytes)
        splits[name] = SplitEntry(
            samples=samples,
            index=path.name,
            index_bytes=path.stat().st_size,
            index_sha256="0" * 64,
            shards=shards,
        )
    Manifest(
        format=FORMAT, dtype="uint8", channels=3, bands=["R", "G", "B"], nan="none", splits=splits
    ).save(folder)


def _open(folder: str) -> None:
    config = load_config("1m", [f"data.path={folder}", "data.workers=0"])
    before = _peak_mb()  # of the libraries: hundreds of MB in some builds of torch
    start = time.perf_counter()
    galaxies = Galaxies(config)
    galaxies.open(0, 1)
    next(next(galaxies.steps(20_000, 20_001)))
    seconds = time.perf_counter() - start
    added = _peak_mb() - before
    print(json.dumps({"samples": SAMPLES, "seconds": seconds, "added_memory_mb": added}))


def _peak_mb() -> float:
    """This process's own peak; getrusage would tell its parent's where that was higher."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    _open(sys.argv[1])
