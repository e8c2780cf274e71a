"""What a run ran on: versions, devices, and the kernel that attention took."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from astropt_ds.attention import resolve_kernel, sdpa_backend
from astropt_ds.config import Config
from astropt_ds.training.ranks import Ranks

PACKAGES = (
    *("astropt-ds", "torch", "deepspeed", "numpy", "webdataset", "simplejpeg"),
    *("flash-attn", "flash-attn-3", "flash-attn-4"),
)

COMMIT = "commit"  # beside a copy of the package, which slurm/common.sh makes


def environment(config: Config, ranks: Ranks) -> dict[str, Any]:
    """The contents of ``environment.json``."""
    micro, accumulation = config.batch.split(ranks.size)
    return {
        "python": platform.python_version(),
        "packages": versions(),
        "commit": _commit(),
        "ranks": ranks.size,
        "device": ranks.device_name,
        "processor": platform.processor() or platform.machine(),
        "attention_kernel": attention_kernel(config, ranks),
        "zero_stage": config.zero.level,
        "precision": config.precision,
        "micro_batch": micro,
        "accumulation": accumulation,
    }


def versions() -> dict[str, str | None]:
    """Of the packages that a run depends on; None where one is not installed."""
    return {name: version_of(name) for name in PACKAGES}


def description(config: Config, ranks: Ranks) -> str:
    """Devices, precision and batch of a run, in a line."""
    micro, accumulation = config.batch.split(ranks.size)
    return (
        f"{ranks.size} x {ranks.device_name}, ZeRO-{config.zero.level}, {config.precision}, "
        f"attention {attention_kernel(config, ranks)}, global batch {config.batch.global_images} = "
        f"{ranks.size} ranks x {micro} images x {accumulation} accumulation"
    )


def attention_kernel(config: Config, ranks: Ranks) -> str:
    """The kernel that the configured one resolves to on this rank's device.

    Of torch's SDPA on a GPU also the back end that it takes: ``sdpa (flash)``.

    Raises:
        UserError: it cannot run there.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    inputs = (ranks.device, dtype, config.model.width // config.model.heads)
    kernel = resolve_kernel(config.attention.kernel, *inputs)
    if kernel == "sdpa" and ranks.device.type == "cuda":
        return f"sdpa ({sdpa_backend(*inputs)})"
    return kernel


def version_of(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The git commit of the code that runs, where it runs from a checkout or a copy of one."""
    code = Path(__file__).parents[2]
    if (code / COMMIT).exists():  # the copy may lie in another repository
        return (code / COMMIT).read_text().strip()
    command = ["git", "-C", str(code), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
