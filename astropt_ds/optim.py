"""AdamW and its parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from astropt_ds.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: tensors of two or more dimensions decay, the rest (norms, biases) do not.

    The dimensions are the logical ones: under ZeRO-3 a parameter is an empty tensor that keeps
    its whole shape as ``ds_shape``.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) >= 2 else free).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


class GuardedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) that moves nothing where ``permitted()`` says no.

    DeepSpeed knows the global norm of a partitioned gradient only within its own step, just before
    it calls this one: here is the last place to call an update off, at every ZeRO stage.
    """

    permitted: Callable[[], bool] | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update, if it is permitted."""
        if self.permitted is None or self.permitted():
            super().step(closure)


def adamw(model: nn.Module, config: OptimConfig) -> GuardedAdamW:
    """The optimizer of a model; torch's fused kernel: no compiler, one pass over memory."""
    return GuardedAdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
