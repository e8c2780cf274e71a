"""The transformer block: a pure function of its input and weights, and the module that owns them.

Purity is what makes speed simple. The function compiles to one graph without breaks at every ZeRO
stage, since DeepSpeed's hooks, which gather a partitioned block's weights, stay outside of it; and
it can be run again in the backward pass instead of keeping what it computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from astropt_ds.attention import attention, resolve_kernel
from astropt_ds.config import ModelConfig
from astropt_ds.layers import MLP, Init, Linear

BlockFunction = Callable[..., Tensor]  # of the arguments of block_forward

aten = torch.ops.aten
PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default})


def block_forward(
    x: Tensor,
    heads: int,
    causal: bool,
    kernel: str,
    ln_1: Tensor,
    c_attn: Tensor,
    attn_c_proj: Tensor,
    ln_2: Tensor,
    c_fc: Tensor,
    mlp_c_proj: Tensor,
) -> Tensor:
    """A pre-norm block (Radford et al. 2019, section 2.3), without biases.

    Args:
        x: (batch, tokens, width).
        heads: of attention; head h owns channels [h * d, (h + 1) * d) of q, k and v.
        causal: each token sees itself and those before it; otherwise all see all.
        kernel: of attention, as :func:`astropt_ds.attention.resolve_kernel` returns it.
        ln_1, c_attn, attn_c_proj: weights of attention's half.
        ln_2, c_fc, mlp_c_proj: weights of the feed-forward half.

    Returns:
        (batch, tokens, width).
    """
    batch, tokens, width = x.shape
    qkv = F.linear(F.layer_norm(x, (width,), ln_1), c_attn)
    q, k, v = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    mixed = attention(q, k, v, causal=causal, kernel=kernel)
    x = x + F.linear(mixed.transpose(1, 2).reshape(batch, tokens, width), attn_c_proj)
    hidden = F.gelu(F.linear(F.layer_norm(x, (width,), ln_2), c_fc), approximate="tanh")
    return x + F.linear(hidden, mlp_c_proj)


def block_function(recompute: str = "none", compiled: bool = False) -> BlockFunction:
    """A way to run :func:`block_forward`: the same numbers, for less memory or time.

    Args:
        recompute: what the backward pass computes again: ``none``; ``selective``: norms and
            activations, but no product; ``full``: all from the block's input.
        compiled: by torch.compile, for the shapes that it meets.
    """
    run: BlockFunction = block_forward
    if recompute != "none":
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if recompute == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept)
        run = partial(checkpoint, block_forward, **options)
    return _compiled(run) if compiled else run


def _compiled(run: BlockFunction) -> BlockFunction:
    """One graph, or an error, with all kernels but flash4, whose own compiler must be let be."""
    # torch warns of operations in place in what is recomputed, on every rank; there are none
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    strict = torch.compile(run, dynamic=False, fullgraph=True)
    broken = torch.compile(run, dynamic=False)

    def choose(x: Tensor, heads: int, causal: bool, kernel: str, *weights: Tensor) -> Tensor:
        return (broken if kernel == "flash4" else strict)(x, heads, causal, kernel, *weights)

    return choose


def _kept(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What selective recomputation keeps: products and attention, cheap in bytes for their work."""
    attends = "attention" in operation.name() or operation.namespace.startswith("flash_attn")
    if operation in PRODUCTS or attends:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class SelfAttention(nn.Module):
    """The weights of multi-head self-attention."""

    def __init__(self, width: int, init: Init) -> None:
        super().__init__()
        self.c_attn = Linear(width, 3 * width, init.at("c_attn"))
        self.c_proj = Linear(width, width, init.at("c_proj"))


class Block(nn.Module):
    """A block's weights, and the way they are run.

    Attributes:
        run: what :func:`block_function` returns.
    """

    run: BlockFunction

    def __init__(self, config: ModelConfig, kernel: str, init: Init) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.width // config.heads
        self.causal = config.attention == "causal"
        self.kernel = kernel
        self.run = block_forward
        self.ln_1 = nn.LayerNorm(config.width, bias=False)
        self.attn = SelfAttention(config.width, init.at("attn"))
        self.ln_2 = nn.LayerNorm(config.width, bias=False)
        self.mlp = MLP(config.width, 4 * config.width, config.width, init.at("mlp"))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        return self.run(
            x,
            self.heads,
            self.causal,
            resolve_kernel(self.kernel, x.device, x.dtype, self.head_dim),
            self.ln_1.weight,
            self.attn.c_attn.weight,
            self.attn.c_proj.weight,
            self.ln_2.weight,
            self.mlp.c_fc.weight,
            self.mlp.c_proj.weight,
        )
