"""What the numbers of a benchmark were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from astropt_ds.training.environment import version_of, versions


def machine() -> dict[str, Any]:
    """Processor, devices, versions and date, as JSON holds them."""
    gpus = range(torch.cuda.device_count())
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in gpus],
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions() | {"astropt": version_of("astropt")},
    }


def _processor() -> str:
    """Its name and what it has for products in bf16."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(values.get("flags", "").split())
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([values.get("model name", platform.machine()), *bf16])
