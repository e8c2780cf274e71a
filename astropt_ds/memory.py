"""Bytes of a training's state on each GPU: closed formulas, no tensors."""

from __future__ import annotations

from astropt_ds.config import Config
from astropt_ds.flops import parameters

# Bytes a parameter of (weights, gradients, AdamW's two moments with the master weights).
STATE = {"fp32": (4, 4, 8), "bf16": (2, 2, 12)}


def state_bytes(config: Config, ranks: int) -> int:
    """Bytes of weights, gradients and optimizer on a rank's device; activations come on top.

    ZeRO's stage 1 splits the optimizer's over the ranks, 2 the gradients too, 3 the weights too
    (Rajbhandari et al. 2020, section 3); offload keeps weights and optimizer in the host's memory.
    """
    weights, gradients, optimizer = STATE[config.precision]
    stage = config.zero.stage
    each = gradients / (ranks if stage >= 2 else 1)
    if not config.zero.offload:
        each += weights / (ranks if stage >= 3 else 1) + optimizer / (ranks if stage >= 1 else 1)
    return round(parameters(config.model) * each)
