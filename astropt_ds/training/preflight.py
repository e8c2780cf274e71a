"""Whether the nodes of a job are fit for a long run: a line each, before it costs GPU hours."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import socket
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from astropt_ds.config import Config
from astropt_ds.data.manifest import SPLITS
from astropt_ds.data.remote import open_store
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError
from astropt_ds.flops import parameters
from astropt_ds.training.environment import versions
from astropt_ds.training.pace import Pace
from astropt_ds.training.ranks import Ranks

# Times the median's time for the same product; processors are shared with whatever else runs.
SLOW = {"cuda": 1.25, "cpu": 4.0}
SLOW_READ = 4.0  # times slower than the median node
REDUCED = {"cuda": 256 << 20, "cpu": 16 << 20}  # bytes of the all-reduce
REPEATS = 5
LEAST_READ, READ_BYTES, BLOCK = 64 << 20, 1 << 30, 8 << 20
READ_S = 5.0
CHECKPOINT = 12  # bytes a parameter: weights and two moments in fp32
GPU_QUERY = {
    "ecc.errors.uncorrected.volatile.total": "{} uncorrected memory errors",
    "clocks_throttle_reasons.hw_slowdown": "slowed down by the hardware ({})",
    "clocks_throttle_reasons.hw_thermal_slowdown": "slowed down by heat ({})",
}
HEALTHY = ("0", "Not Active", "[N/A]", "N/A", "[Not Supported]")


class Rank(NamedTuple):
    """What a rank found.

    Attributes:
        host: where it is.
        device: its name.
        compute_s: seconds that a fixed product takes.
        faults: of its device.
        versions: of what it would run.
        read: bytes a second from the data's folder, if this rank has read and it says something.
        free: bytes for the run's folder.
    """

    host: str
    device: str
    compute_s: float
    faults: list[str]
    versions: dict[str, str | None]
    read: float | None
    free: int


def preflight(
    config: Config, ranks: Ranks, local_rank: int, node: int, say: Callable[[str], None]
) -> bool:
    """Compare the nodes, and measure what joins them. Collective.

    Args:
        config: of the run that is to come: its data, its folder, its model's size.
        ranks: one a GPU.
        local_rank: of this one on its node.
        node: the number of the node, so that each reads other shards.
        say: takes a line for each node, before their links are tried, and one for these.

    Returns:
        Whether all nodes are fit.

    Raises:
        UserError: the data or the run's folder are not there.
    """
    with ranks.together():
        if config.run.dir is None:
            raise UserError("run.dir is missing: a folder for the run, for example run.dir=runs/1m")
        pace = Pace(ranks)
        pace.compute_s()  # the first products also start libraries and wake the clocks
        seconds, faults = pace.compute_s(), gpu_faults(ranks)
        mine = Rank(
            os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            ranks.device_name,
            seconds,
            faults,
            versions() | drivers(ranks),
            read_rate(config, node) if local_rank == 0 else None,
            shutil.disk_usage(_existing(Path(config.run.dir))).free,
        )
    found = ranks.gather(mine)
    needed = CHECKPOINT * parameters(config.model) * ((config.checkpoint.keep or 1) + 1)
    lines, fit = compare(found, needed, ranks.device.type)
    for line in lines:
        say(line)
    size = REDUCED[ranks.device.type]
    rate = all_reduce_rate(ranks, size) / 1e9
    say(f"all-reduce of {size >> 20} MiB over {ranks.size} ranks: {rate:.2f} GB/s (bus bandwidth)")
    return fit


def compare(found: list[Rank], needed: int, kind: str) -> tuple[list[str], bool]:
    """A line for each node, with what makes it unfit; whether all are fit.

    Args:
        found: by all ranks.
        needed: bytes for the run's checkpoints.
        kind: of the device: cuda or cpu.
    """
    product = statistics.median_low(rank.compute_s for rank in found)
    reads = statistics.median_high([rank.read for rank in found if rank.read is not None] or [0.0])
    usual = Counter(tuple(rank.versions.items()) for rank in found).most_common(1)[0][0]
    device = Counter(rank.device for rank in found).most_common(1)[0][0]
    size = Counter(Counter(rank.host for rank in found).values()).most_common(1)[0][0]
    lines, unfit = [], []
    for host in dict.fromkeys(rank.host for rank in found):
        here = [rank for rank in found if rank.host == host]
        faults = [f"GPU {i}: {fault}" for i, rank in enumerate(here) for fault in rank.faults]
        faults += [
            f"device {i} takes {rank.compute_s / product:.1f} times as long as the others"
            for i, rank in enumerate(here)
            if rank.compute_s > SLOW[kind] * product
        ]
        if others := {rank.device for rank in here} - {device}:
            faults.append(f"{', '.join(sorted(others))}, where others have {device}")
        if len(here) != size:
            faults.append(f"{len(here)} ranks, where others have {size}")
        theirs = dict(here[0].versions)
        faults += [
            f"{name} {theirs.get(name)}, where others have {version}"
            for name, version in usual
            if theirs.get(name) != version
        ]
        read = next((rank.read for rank in here if rank.read is not None), None)
        if read is not None and read * SLOW_READ < reads:
            faults.append(f"reads {reads / read:.1f} times slower than others")
        if here[0].free < needed:
            faults.append(
                f"{here[0].free / 1e9:.1f} GB free, of {needed / 1e9:.1f} for checkpoints"
            )
        told = "" if read is None else f", reads {read / 1e6:,.0f} MB/s"
        summary = (
            f"{host}: {len(here)} x {here[0].device}, product {1e3 * here[0].compute_s:.3g} ms"
            f"{told}, {here[0].free / 1e9:,.0f} GB free"
        )
        lines.append(f"{summary}: {'UNFIT: ' + '; '.join(faults) if faults else 'fit'}")
        unfit += [host] * bool(faults)
    if unfit:
        lines.append(f"leave out: --exclude={','.join(unfit)}")
    return lines, not unfit


def gpu_faults(ranks: Ranks) -> list[str]:
    """What nvidia-smi says is wrong with this rank's GPU."""
    if ranks.device.type != "cuda":
        return []
    uuid = f"GPU-{torch.cuda.get_device_properties(ranks.device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(GPU_QUERY)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi does not answer ({error})"]
    if done.returncode:
        return [f"nvidia-smi: {' '.join(done.stdout.split())}"]
    values = next(csv.reader(done.stdout.splitlines(), skipinitialspace=True), [])
    if len(values) != len(GPU_QUERY):
        return [f"nvidia-smi answers {done.stdout.strip()!r}"]
    return [
        text.format(value)
        for text, value in zip(GPU_QUERY.values(), values, strict=True)
        if value not in HEALTHY
    ]


def drivers(ranks: Ranks) -> dict[str, str | None]:
    """Versions of what lies below the packages."""
    found: dict[str, str | None] = {
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    if ranks.device.type == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        path = Path("/sys/module/nvidia/version")
        found["nvidia driver"] = path.read_text().strip() if path.exists() else None
    return found


def read_rate(config: Config, node: int) -> float | None:
    """Bytes a second that this node reads of the data's shards.

    None where they are remote, or too small for a time that means something.

    Raises:
        UserError: there are none.
    """
    read, start = 0, 0.0
    for where in config.data.located().values():
        store = open_store(where.path, config.data)
        if not isinstance(store, Folder):
            continue
        names = [shard.name for split in SPLITS for shard in store.manifest.splits[split].shards]
        start = start or time.monotonic()
        for place in range(len(names)):
            file = store.file(names[(node * 7 + place) % len(names)])  # each node its own
            read += _read(file, READ_BYTES - read)
            if read >= READ_BYTES or time.monotonic() - start > READ_S:
                break
    return read / (time.monotonic() - start) if read >= LEAST_READ else None


def _read(path: str, most: int) -> int:
    """Read a file, past the page cache where the system lets us."""
    descriptor, read = os.open(path, os.O_RDONLY), 0
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        while read < most and (block := os.read(descriptor, BLOCK)):
            read += len(block)
    finally:
        os.close(descriptor)
    return read


def all_reduce_rate(ranks: Ranks, size: int) -> float:
    """Bytes a second through the slowest link of an all-reduce: 2 (n - 1) / n of its size, as
    NVIDIA's nccl-tests count. Collective."""
    tensor = torch.ones(size // 4, device=ranks.device)
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * (ranks.size - 1) / ranks.size * size / statistics.median(seconds)


def _existing(path: Path) -> Path:
    """The folder itself, or the one that it would be made in."""
    while not path.exists():
        path = path.absolute().parent
    return path
