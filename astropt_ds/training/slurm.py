"""srun as a launcher: the tasks of a job step are the ranks of a run."""

from __future__ import annotations

import os
import re

# Of the first node, by job and step: jobs that share a node do not meet. Below the ports that Linux
# gives to outgoing connections.
PORTS = range(10_000, 30_000)
# Ports between the steps of a job, and between its starts: jobs that begin together have near
# numbers, and one whose port another program has is not to meet it again.
STEP, START = 7919, 104_729


def adopt_step() -> None:
    """Describe a task of srun to this process as torchrun describes its ranks.

    Elsewhere nothing happens: in a batch script, in a step of one task, in the shell of
    ``srun --pty``. What a launcher or a user has set already stays.
    """
    given = os.environ
    alone = given.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    if alone or "RANK" in given or "SLURM_PTY_PORT" in given:
        return
    tasks = expand_counts(given["SLURM_STEP_TASKS_PER_NODE"])
    number = int(given["SLURM_JOB_ID"]) + STEP * int(given["SLURM_STEP_ID"])
    number += START * int(given.get("SLURM_RESTART_COUNT", "0"))
    given["RANK"] = given["SLURM_PROCID"]
    given["WORLD_SIZE"] = given["SLURM_STEP_NUM_TASKS"]
    given["LOCAL_RANK"] = given["SLURM_LOCALID"]
    given["LOCAL_WORLD_SIZE"] = str(tasks[int(given["SLURM_NODEID"])])
    given.setdefault("MASTER_ADDR", first_host(given["SLURM_STEP_NODELIST"]))
    given.setdefault("MASTER_PORT", str(PORTS[number % len(PORTS)]))


def first_host(nodes: str) -> str:
    """The first of the hosts that Slurm names in its short way: gpu[03-07,12],login1 is gpu03."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else nodes)


def expand_counts(counts: str) -> list[int]:
    """A number for each node, which Slurm abbreviates: 8(x2),4 is 8, 8, 4."""
    found: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        found += [int(number)] * int(times or 1)
    return found
