"""What can be said of a training: what it has consumed, and how well it went."""

from __future__ import annotations

import math
from typing import Any

from astropt_ds.config import Config
from astropt_ds.flops import training_flops


def counters(config: Config, step: int) -> dict[str, int]:
    """What a run has consumed after so many steps: samples, tokens, and exact FLOPs."""
    samples, tokens = step * config.batch.global_images, config.tokens_per_image
    flops = samples * training_flops(config.model, tokens)
    return {"samples": samples, "tokens": samples * tokens, "flops": flops}


def training_facts(
    config: Config, step: int, updates: int, data: Any, losses: dict[str, float | None]
) -> dict[str, Any]:
    """What a checkpoint and a model folder say of the training, as JSON holds it."""
    return {
        "step": step,
        "updates": updates,
        **counters(config, step),
        **known(losses),
        "image_size": config.data.image_size,
        "seed": config.seed,
        "data": data,
    }


def known(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are none become null: JSON has no word for them."""
    unknown = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {key: None if key in unknown else value for key, value in values.items()}
