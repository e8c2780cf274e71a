"""What each way of partitioning tells DeepSpeed: the files of ds_configs/, one for each."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from astropt_ds.config import ZeroConfig

DS_CONFIGS = Path(__file__).parent / "ds_configs"


def zero_settings(zero: ZeroConfig, gpu: bool) -> dict[str, Any]:
    """The DeepSpeed dictionary of a stage, without batch, precision and clipping.

    Args:
        zero: a settled stage.
        gpu: whether it is for GPUs; processors have files of their own where that pays.
    """
    name = f"zero{zero.level}" + "_offload" * zero.offload + "_hpz" * zero.hpz
    if not gpu and (DS_CONFIGS / f"{name}_cpu.json").exists():
        name += "_cpu"
    return json.loads(_text(name))


@cache
def _text(name: str) -> str:
    return (DS_CONFIGS / f"{name}.json").read_text()
