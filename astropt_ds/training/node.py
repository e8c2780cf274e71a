"""What a rank of the preflight finds where it is: its device, its disks, its links."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from astropt_ds.config import Config
from astropt_ds.data.manifest import SPLITS
from astropt_ds.data.remote import open_store
from astropt_ds.data.store import Folder
from astropt_ds.errors import UserError, one_line
from astropt_ds.files import nearest_folder
from astropt_ds.training.environment import versions
from astropt_ds.training.gpu_health import Health, gpu_health
from astropt_ds.training.pace import Pace
from astropt_ds.training.ranks import Ranks

REPEATS = 5
LEAST_READ, READ_BYTES, BLOCK = 64 << 20, 1 << 30, 8 << 20
READ_S = 5.0


class Rank(NamedTuple):
    """What a rank found.

    Attributes:
        host: where it is.
        device: its name.
        compute_s: seconds that a fixed product takes; None where it fails.
        clock: of a GPU under load, MHz.
        faults: of its device.
        unreadable: what is wrong with the data for this rank, if it has read.
        versions: of what it would run.
        read: bytes a second from the data's folder, if this rank has read and it says something.
        free: bytes for the run's folder.
    """

    host: str
    device: str
    compute_s: float | None
    clock: int | None
    faults: list[str]
    unreadable: str | None
    versions: dict[str, str | None]
    read: float | None
    free: int


def look(config: Config, ranks: Ranks, reads_for: int | None) -> Rank:
    """What this rank finds; it reads shards if it is to do so for a node of this number."""
    seconds, health, faults = None, Health(None, []), []
    read = unreadable = None
    try:
        pace = Pace(ranks)
        pace.compute_s()  # the first products also start libraries and wake the clocks
        seconds = pace.compute_s()
        health = gpu_health(ranks)
    except RuntimeError as error:  # of the device
        faults.append(f"cannot compute: {one_line(error)}")
    try:
        read = None if reads_for is None else read_rate(config, reads_for)
    except (UserError, OSError) as error:
        unreadable = f"data: {one_line(error)}"
    return Rank(
        host_name(),
        ranks.device_name,
        seconds,
        health.clock,
        faults + health.faults,
        unreadable,
        versions() | drivers(ranks),
        read,
        shutil.disk_usage(nearest_folder(Path(config.run.dir or ""))).free,
    )


def host_name() -> str:
    """Of this node, as Slurm or the system calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def drivers(ranks: Ranks) -> dict[str, str | None]:
    """Versions of what lies below the packages."""
    found: dict[str, str | None] = {"python": platform.python_version()}
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


def all_reduce_rate(
    ranks: Ranks, size: int, group: dist.ProcessGroup | None = None
) -> float | None:
    """Bytes a second through the slowest link of an all-reduce: 2 (n - 1) / n of its size, as
    NVIDIA's nccl-tests count. Collective over the group; None if that is one rank."""
    members = dist.get_world_size(group)
    if members == 1:
        return None
    tensor = torch.ones(size // 4, device=ranks.device)
    seconds = []
    for _ in range(1 + REPEATS):  # in the first connections are made
        dist.barrier(group)
        start = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * (members - 1) / members * size / statistics.median(seconds[1:])
