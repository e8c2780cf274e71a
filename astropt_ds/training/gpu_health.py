"""What NVIDIA's driver says of a GPU while it computes."""

from __future__ import annotations

import csv
import subprocess
from typing import NamedTuple

import torch

from astropt_ds.training.ranks import Ranks

LOAD_S = 3.0  # of products, so that clocks are those of work
SIDE, TRIAL = 4096, 30
WAIT_S = 60

# What is said of a GPU, by field; with "clocks_throttle_reasons" before drivers of 2023.
REASONS = "clocks_event_reasons"
OLD_REASONS = "clocks_throttle_reasons"
CLOCK = "clocks.sm"
STATE = {
    "ecc.errors.uncorrected.volatile.total": "{} uncorrected memory errors",
    f"{REASONS}.hw_slowdown": "slowed down by the hardware",
    f"{REASONS}.hw_thermal_slowdown": "slowed down by heat",
    f"{REASONS}.sw_thermal_slowdown": "slowed down by heat, the driver says",
}
MEMORY = {
    "remapped_rows.pending": "memory rows to be remapped at the next reset",
    "remapped_rows.failure": "memory rows that cannot be remapped",
}
HEALTHY = ("0", "No", "Not Active", "[N/A]", "N/A", "[Not Supported]")


class Health(NamedTuple):
    """Of a GPU.

    Attributes:
        clock: of its multiprocessors, MHz; None where there is no GPU.
        faults: in words; none of a healthy one.
    """

    clock: int | None
    faults: list[str]


class NoAnswerError(Exception):
    """nvidia-smi does not say what it is asked."""


def gpu_health(ranks: Ranks) -> Health:
    """What nvidia-smi says of this rank's GPU under load."""
    if ranks.device.type != "cuda":
        return Health(None, [])
    uuid = f"GPU-{torch.cuda.get_device_properties(ranks.device).uuid}"
    _start_products(ranks.device)
    found = ask(uuid)
    torch.cuda.synchronize()
    return found


def ask(uuid: str) -> Health:
    """What nvidia-smi says of the GPU with this name."""
    try:
        try:
            state = _query("gpu", uuid, [CLOCK, *STATE])
        except NoAnswerError as error:
            if REASONS not in str(error):
                raise
            old = [field.replace(REASONS, OLD_REASONS) for field in (CLOCK, *STATE)]
            state = _query("gpu", uuid, old)
    except NoAnswerError as error:
        return Health(None, [str(error)])
    try:
        memory = _query("remapped-rows", uuid, list(MEMORY))
    except NoAnswerError:  # GPUs before the A100 have none
        memory = ["N/A"] * len(MEMORY)
    texts = [*STATE.values(), *MEMORY.values()]
    faults = [
        text.format(value)
        for text, value in zip(texts, [*state[1:], *memory], strict=True)
        if value not in HEALTHY
    ]
    return Health(int(state[0]) if state[0].isdigit() else None, faults)


def _query(kind: str, uuid: str, fields: list[str]) -> list[str]:
    command = ["nvidia-smi", f"--id={uuid}", f"--query-{kind}={','.join(fields)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswerError(f"nvidia-smi does not answer ({error})") from None
    values = next(csv.reader(done.stdout.splitlines(), skipinitialspace=True), [])
    if done.returncode or len(values) != len(fields):
        raise NoAnswerError(f"nvidia-smi answers {' '.join(done.stdout.split())!r}")
    return values


def _start_products(device: torch.device) -> None:
    """Set the GPU to work for some seconds, without waiting for it."""
    matrix = torch.ones(SIDE, SIDE, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(TRIAL):
        matrix @ matrix
    end.record()
    end.synchronize()
    for _ in range(round(LOAD_S * 1e3 * TRIAL / start.elapsed_time(end))):
        matrix @ matrix
