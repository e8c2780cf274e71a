"""The processes of a run: who this one is, what it computes on, and how they agree."""

from __future__ import annotations

import datetime
import os
import resource
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist

from astropt_ds.errors import UserError

TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank: from 0 to size - 1.
        size: processes in the run.
        device: what this one computes on.
        group: over which they talk; the default one if None.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The device's name as its vendor gives it; ``cpu`` for a processor."""
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else "cpu"

    def per_node(self) -> int:
        """Ranks of each node, of the smallest where they differ. Collective."""
        return min(Counter(self.hosts()).values())

    def hosts(self) -> list[str]:
        """Where each rank is. Collective."""
        return self.gather(socket.gethostname())

    def device_memory(self) -> int | None:
        """Bytes of the smallest GPU of all ranks; None where processors compute. Collective."""
        if self.device.type != "cuda":
            return None
        return min(self.gather(torch.cuda.get_device_properties(self.device).total_memory))

    def peak_memory(self) -> int:
        """Bytes of the device, or of this process where the device is the processor."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small picklable value, on every rank."""
        if self.size == 1:  # which may be without a process group: a tool's one process
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def apart(self) -> Ranks:
        """The same ranks over a line of their own, for a thread beside the main one. Collective."""
        return replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    def agree_on_device(self) -> None:
        """Refuse a run of which one rank has lost its GPU; collective.

        Raises:
            UserError: some compute on GPUs and some do not.
        """
        places = self.gather((self.device.type, socket.gethostname()))
        if len({device for device, _ in places}) > 1:
            without = sorted({host for device, host in places if device == "cpu"})
            raise UserError(
                f"no GPU on {', '.join(without)}, where others have one; DS_ACCELERATOR=cpu would "
                "train without on all"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """If any rank fails in this block, all do; by a user's mistake, with the same message.

        Without it the others would wait for that rank in their next collective.
        """
        problem, failure = None, None
        try:
            yield
        except (UserError, OSError) as error:
            problem = str(error) or repr(error)
        except Exception as error:  # ours, not the user's: told to the others, raised as it is
            problem, failure = repr(error), error
        self.agree(problem, failure)

    def agree(self, problem: str | None, failure: Exception | None = None) -> None:
        """If any rank has a problem, all raise it; collective.

        Raises:
            UserError: the first rank's that has one.
            Exception: ``failure`` itself, on the rank that brings one.
        """
        problems = self.gather(problem)
        if failure:
            raise failure
        if any(problems):
            rank = next(rank for rank, problem in enumerate(problems) if problem)
            everywhere = all(problem == problems[rank] for problem in problems)
            raise UserError(problems[rank] if everywhere else f"rank {rank}: {problems[rank]}")


# A tool's one process, which needs no process group.
ALONE = Ranks(rank=0, size=1, device=torch.device("cpu"))


@contextmanager
def start(timeout: datetime.timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Join the process group that a launcher described, or make one of this process.

    The device is the local rank's GPU, or the CPU where there is none or DS_ACCELERATOR=cpu.

    Args:
        timeout: for the slowest rank, here and in every collective.

    Raises:
        UserError: the environment describes no group, or more processes than GPUs; on all ranks,
            where it is so on one.
    """
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if address and (size > 1 or len(address) == 1):
        missing = " and ".join(sorted(address))
        raise UserError(f"{missing} not set; torchrun, deepspeed and srun do that")
    problem, device = None, torch.device("cpu")
    try:
        device = _device(int(os.environ["LOCAL_RANK"]))
    except UserError as error:  # told when there are others to tell it to
        problem = f"{socket.gethostname()}: {error}" if size > 1 else str(error)
    # gloo beside nccl: objects and the CPU's own tensors need no GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if address:  # one process alone needs no port
        dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        ranks = Ranks(rank, size, device)
        ranks.agree(problem)
        ranks.agree_on_device()
        places = ranks.gather((socket.gethostname(), os.sched_getaffinity(0)))
        if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads(places, rank))
        yield ranks
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if uses_gpu():
        visible = torch.cuda.device_count()
        # a scheduler may show each process its own device only
        index = 0 if visible == 1 else local_rank
        if index >= visible:
            raise UserError(
                f"local rank {local_rank} has no GPU: {visible} are visible; start {visible} "
                "processes a node, or set DS_ACCELERATOR=cpu"
            )
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes its device from there
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device("cpu")


def even_nodes(hosts: list[str]) -> int:
    """Ranks of each node, if all have as many, one node's after another's.

    Args:
        hosts: of each rank.

    Raises:
        UserError: they do not.
    """
    size = hosts.count(hosts[0])
    nodes = [hosts[first : first + size] for first in range(0, len(hosts), size)]
    together = all(node == node[:1] * size for node in nodes)
    if not together or len(nodes) > len(set(hosts)):
        raise UserError(
            "zero.hpz=true wants as many ranks on each node, one node's after another's (srun "
            "--distribution=block); zero.hpz=false would be right here"
        )
    return size


def threads(places: list[tuple[str, set[int]]], rank: int) -> int:
    """How many threads make a rank's share of the cores, whether or not its launcher bound it.

    Args:
        places: of each rank, the host and the cores that it may use there. One that several may
            use is shared out among them.
        rank: the one in question.
    """
    host, cores = places[rank]
    beside = [theirs for there, theirs in places if there == host]
    return max(1, int(sum(Fraction(1, sum(core in c for c in beside)) for core in cores)))


def uses_gpu() -> bool:
    """Whether this process computes on a GPU; DS_ACCELERATOR says so, or whether there is one.

    Raises:
        UserError: DS_ACCELERATOR=cuda, and there is none.
    """
    wanted, there = os.environ.get("DS_ACCELERATOR"), torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError("DS_ACCELERATOR=cuda: torch sees no GPU here; cpu computes without")
    return there and wanted in (None, "cuda")


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        UserError: bf16 on a GPU without it.
    """
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(
            f"precision=bf16: {torch.cuda.get_device_name(device)} has no bf16; fp32 would be right"
        )
