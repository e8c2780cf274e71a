"""Whether the nodes of a job are fit for a long run: a line each, before it costs GPU hours."""

from __future__ import annotations

import datetime
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from astropt_ds.config import Config
from astropt_ds.errors import UserError
from astropt_ds.flops import parameters
from astropt_ds.training.node import Rank, all_reduce_rate, host_name, look
from astropt_ds.training.ranks import Ranks

# Times the median's time for the same product; processors are shared with whatever else runs.
SLOW = {"cuda": 1.25, "cpu": 4.0}
SLOW_CLOCK = 0.85  # of the median GPU's clock
SLOW_READ = 4.0  # times slower than the median node
SLOW_LINK = 1.5  # the same for the links within a node
REDUCED = {"cuda": 256 << 20, "cpu": 16 << 20}  # bytes of the all-reduce
CHECKPOINT = 12  # bytes a parameter: weights and two moments in fp32


def preflight(
    config: Config,
    ranks: Ranks,
    reads_for: int | None,
    least: float,
    timeout: datetime.timedelta,
    say: Callable[[str], None],
) -> bool:
    """Compare the nodes, and measure what joins them. Collective.

    Args:
        config: of the run that is to come: its data, its folder, its model's size.
        ranks: one a GPU.
        reads_for: the number of the node for which this rank reads shards, others than other nodes.
        least: bytes a second of the all-reduce that are enough.
        timeout: for the slowest rank.
        say: takes a line for each node, before their links are tried, and those for the links.

    Returns:
        Whether all nodes are fit, and their links.

    Raises:
        UserError: a node does not answer in time.
    """
    if config.run.dir is None:
        raise UserError("run.dir is missing: a folder for the run, for example run.dir=runs/1m")
    hosts: dict[str, list[int]] = {}
    for number, host in enumerate(ranks.gather(host_name())):
        hosts.setdefault(host, []).append(number)

    with all_in_time(hosts, timeout):
        mine = look(config, ranks, reads_for)
    found = ranks.gather(mine)
    needed = CHECKPOINT * parameters(config.model) * ((config.checkpoint.keep or 1) + 1)
    lines, unfit = compare(found, needed, ranks.device.type)
    for line in lines:
        say(line)

    fit = not unfit
    if any(rank.compute_s is None for rank in found):
        say("all-reduce: not tried, since a device does not compute")
    else:
        size = REDUCED[ranks.device.type]
        # all make all groups, each reduces in its own
        groups = {host: dist.new_group(each, timeout=timeout) for host, each in hosts.items()}
        inside = ranks.gather(all_reduce_rate(ranks, size, groups[mine.host]))
        lines, slow = compare_links({host: inside[each[0]] for host, each in hosts.items()})
        unfit += slow
        rate = all_reduce_rate(ranks, size)
        if rate is not None:
            fit = rate >= least
            verdict = "fit" if fit else f"UNFIT: {least / 1e9:g} would be enough"
            lines.append(
                f"all-reduce over {ranks.size} ranks, {size >> 20} MiB: {_speed(rate)}: {verdict}"
            )
        for line in lines:
            say(line)
    if unfit:
        say(f"leave out: --exclude={','.join(dict.fromkeys(unfit))}")
    return fit and not unfit


@contextmanager
def all_in_time(hosts: dict[str, list[int]], timeout: datetime.timedelta) -> Iterator[None]:
    """Wait for all ranks at the end of the block. Collective.

    Raises:
        UserError: on the first, with the hosts of those that do not come.
    """
    group = dist.new_group(backend="gloo", timeout=timeout)
    yield
    try:
        dist.monitored_barrier(group, timeout, wait_all_ranks=True)
    except RuntimeError as error:
        failed = re.search(r"Ranks? ([\d, ]+) failed", str(error))
        numbers = set(map(int, re.findall(r"\d+", failed[1]))) if failed else set()
        lost = [host for host, each in hosts.items() if numbers & set(each)]
        raise UserError(
            f"no answer in {timeout.total_seconds():g} s from {', '.join(lost) or 'a node'}; "
            f"leave out: --exclude={','.join(lost)}"
        ) from None


def compare(found: list[Rank], needed: int, kind: str) -> tuple[list[str], list[str]]:
    """A line for each node, with what makes it unfit; the hosts that are.

    Args:
        found: by all ranks.
        needed: bytes for the run's checkpoints.
        kind: of the device: cuda or cpu.
    """
    times = [rank.compute_s for rank in found if rank.compute_s is not None]
    product = statistics.median_low(times or [0.0])
    reads = statistics.median_high([rank.read for rank in found if rank.read is not None] or [0.0])
    clock = statistics.median_high([rank.clock for rank in found if rank.clock] or [0])
    usual = Counter(tuple(rank.versions.items()) for rank in found).most_common(1)[0][0]
    device = Counter(rank.device for rank in found).most_common(1)[0][0]
    size = Counter(Counter(rank.host for rank in found).values()).most_common(1)[0][0]
    lines, unfit = [], []
    for host in dict.fromkeys(rank.host for rank in found):
        here = [rank for rank in found if rank.host == host]
        faults = [f"GPU {i}: {fault}" for i, rank in enumerate(here) for fault in rank.faults]
        faults += [rank.unreadable for rank in here if rank.unreadable]
        faults += [
            f"device {i} takes {rank.compute_s / product:.1f} times as long as the others"
            for i, rank in enumerate(here)
            if rank.compute_s is not None and rank.compute_s > SLOW[kind] * product
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
            f"{host}: {len(here)} x {here[0].device}"
            + (f", product {1e3 * here[0].compute_s:.3g} ms" if here[0].compute_s else "")
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


def _speed(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s (bus bandwidth)"
