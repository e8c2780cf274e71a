"""Whether the nodes of a job are fit for a long run: a line each, before it costs GPU hours."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
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
from astropt_ds.training.gpu_health import gpu_health
from astropt_ds.training.pace import Pace
from astropt_ds.training.ranks import Ranks

# Times the median's time for the same product; processors are shared with whatever else runs.
SLOW = {"cuda": 1.25, "cpu": 4.0}
SLOW_CLOCK = 0.85  # of the median GPU's clock
SLOW_READ = 4.0  # times slower than the median node
SLOW_LINK = 1.5  # the same for the links within a node
REDUCED = {"cuda": 256 << 20, "cpu": 16 << 20}  # bytes of the all-reduce
REPEATS = 5
LEAST_READ, READ_BYTES, BLOCK = 64 << 20, 1 << 30, 8 << 20
READ_S = 5.0
CHECKPOINT = 12  # bytes a parameter: weights and two moments in fp32


class Rank(NamedTuple):
    """What a rank found.

    Attributes:
        host: where it is.
        device: its name.
        compute_s: seconds that a fixed product takes.
        clock: of a GPU under load, MHz.
        faults: of its device.
        versions: of what it would run.
        read: bytes a second from the data's folder, if this rank has read and it says something.
        free: bytes for the run's folder.
    """

    host: str
    device: str
    compute_s: float
    clock: int | None
    faults: list[str]
    versions: dict[str, str | None]
    read: float | None
    free: int


def preflight(
    config: Config,
    ranks: Ranks,
    local_rank: int,
    node: int,
    least: float,
    say: Callable[[str], None],
) -> bool:
    """Compare the nodes, and measure what joins them. Collective.

    Args:
        config: of the run that is to come: its data, its folder, its model's size.
        ranks: one a GPU.
        local_rank: of this one on its node.
        node: the number of the node, so that each reads other shards.
        least: bytes a second of the all-reduce that are enough.
        say: takes a line for each node, before their links are tried, and those for the links.

    Returns:
        Whether all nodes are fit, and their links.

    Raises:
        UserError: the data or the run's folder are not there.
    """
    with ranks.together():
        if config.run.dir is None:
            raise UserError("run.dir is missing: a folder for the run, for example run.dir=runs/1m")
        mine = look(config, ranks, node if local_rank == 0 else None)
    found = ranks.gather(mine)
    needed = CHECKPOINT * parameters(config.model) * ((config.checkpoint.keep or 1) + 1)
    lines, unfit = compare(found, needed, ranks.device.type)
    for line in lines:
        say(line)

    hosts: dict[str, list[int]] = {rank.host: [] for rank in found}
    for number, rank in enumerate(found):
        hosts[rank.host].append(number)
    size = REDUCED[ranks.device.type]
    # all make all groups, each reduces in its own
    groups = {host: dist.new_group(members) for host, members in hosts.items()}
    inside = ranks.gather(all_reduce_rate(ranks, size, groups[mine.host]))
    lines, slow = compare_links({host: inside[members[0]] for host, members in hosts.items()})
    for line in lines:
        say(line)
    rate = all_reduce_rate(ranks, size)
    enough = rate is None or rate >= least
    if rate is not None:
        verdict = "fit" if enough else f"UNFIT: {least / 1e9:g} would be enough"
        say(f"all-reduce over {ranks.size} ranks, {size >> 20} MiB: {_speed(rate)}: {verdict}")
    if bad := [host for host in hosts if host in unfit + slow]:
        say(f"leave out: --exclude={','.join(bad)}")
    return enough and not bad


def look(config: Config, ranks: Ranks, reads_for: int | None) -> Rank:
    """What this rank finds; it reads shards if it is to do so for a node."""
    pace = Pace(ranks)
    pace.compute_s()  # the first products also start libraries and wake the clocks
    seconds = pace.compute_s()
    clock, faults = gpu_health(ranks)
    return Rank(
        os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        ranks.device_name,
        seconds,
        clock,
        faults,
        versions() | drivers(ranks),
        None if reads_for is None else read_rate(config, reads_for),
        shutil.disk_usage(_existing(Path(config.run.dir or ""))).free,
    )


def compare(found: list[Rank], needed: int, kind: str) -> tuple[list[str], list[str]]:
    """A line for each node, with what makes it unfit; the hosts that are.

    Args:
        found: by all ranks.
        needed: bytes for the run's checkpoints.
        kind: of the device: cuda or cpu.
    """
    product = statistics.median_low(rank.compute_s for rank in found)
    reads = statistics.median_high([rank.read for rank in found if rank.read is not None] or [0.0])
    clock = statistics.median_high([rank.clock for rank in found if rank.clock] or [0])
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
        faults += [
            f"GPU {i} runs at {rank.clock} MHz, others at {clock}"
            for i, rank in enumerate(here)
            if rank.clock is not None and rank.clock < SLOW_CLOCK * clock
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
        summary = (
            f"{host}: {len(here)} x {here[0].device}, product {1e3 * here[0].compute_s:.3g} ms"
            + (f" at {here[0].clock} MHz" if here[0].clock else "")
            + (f", reads {read / 1e6:,.0f} MB/s" if read else "")
            + f", {here[0].free / 1e9:,.0f} GB free"
        )
        lines.append(f"{summary}: {'UNFIT: ' + '; '.join(faults) if faults else 'fit'}")
        unfit += [host] * bool(faults)
    return lines, unfit


def compare_links(rates: dict[str, float | None]) -> tuple[list[str], list[str]]:
    """Lines on the all-reduce of each node's own GPUs, and the hosts whose is slow.

    Args:
        rates: bytes a second, by host; None where a node has one rank.
    """
    known = {host: rate for host, rate in rates.items() if rate is not None}
    if not known:
        return [], []
    usual = statistics.median_high(known.values())
    slow = [host for host, rate in known.items() if rate * SLOW_LINK < usual]
    lines = [f"all-reduce within nodes: {_speed(usual)} (median)"]
    lines += [f"{host}: UNFIT: all-reduce within it {_speed(known[host])}" for host in slow]
    return lines, slow


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


def _speed(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s (bus bandwidth)"


def _existing(path: Path) -> Path:
    """The folder itself, or the one that it would be made in."""
    while not path.exists():
        path = path.absolute().parent
    return path
