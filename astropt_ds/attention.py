"""Scaled dot-product attention: one function, three kernels, and the choice between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from astropt_ds.errors import UserError

KERNELS = ("flash", "sdpa", "eager")


def resolve_kernel(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that runs when ``requested`` is asked for on this device and dtype.

    ``auto`` takes flash-attn where it can run (CUDA, half precision, the package installed) and
    torch's SDPA elsewhere.

    Raises:
        UserError: ``flash`` is asked for where it cannot run, or there is no such kernel.
    """
    if requested in ("sdpa", "eager"):
        return requested
    if requested not in ("auto", "flash"):
        raise UserError(f"attention.kernel={requested}: auto, flash, sdpa or eager would be right")
    lacks = _flash_lacks(device, dtype)
    if not lacks:
        return "flash"
    if requested == "flash":
        raise UserError(f"attention.kernel=flash needs {lacks}; auto or sdpa would be right here")
    return "sdpa"


def _flash_lacks(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return f"a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "precision=bf16"
    if _flash_attn_func() is None:
        return "the flash-attn package (pip install 'astropt-ds[flash]')"
    return ""


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, kernel: str) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1).

    Args:
        q, k, v: (batch, heads, tokens, d).
        causal: each token sees itself and those before it; otherwise all see all.
        kernel: ``flash``, ``sdpa`` or ``eager``, as :func:`resolve_kernel` returns it.

    Returns:
        (batch, heads, tokens, d).
    """
    if kernel == "flash":
        return _flash(q, k, v, causal)
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if kernel == "eager":
        return _eager(q, k, v, causal)
    raise ValueError(f"kernel {kernel!r}: one of {', '.join(KERNELS)} would be right")


@lru_cache(maxsize=1)
def _flash_attn_func() -> Callable[..., Tensor] | None:
    """flash-attn's function, or None where it is missing or its build does not fit this torch."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    flash_attn_func = _flash_attn_func()
    assert flash_attn_func is not None
    # flash-attn wants (batch, tokens, heads, d); these are views, nothing is copied
    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
    return out.transpose(1, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(dim=-1) @ v
