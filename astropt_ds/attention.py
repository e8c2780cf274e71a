"""Scaled dot-product attention: one function, its kernels, and the choice between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from astropt_ds.errors import UserError


class Flash(NamedTuple):
    """A generation of flash-attn, and where its gradients can be trusted."""

    module: str
    source: str  # where to have it from
    majors: tuple[int, ...]  # of the GPU's compute capability
    multiple: int  # of which a head's dimension must be one
    most: int  # that it may be


# The newest first. FlashAttention-4 accepts more head dimensions than these, but its betas gave
# wrong gradients for what is no multiple of 32 (flash-attention#2698, #2896) and for 256 on
# Blackwell (TransformerEngine#3216), and are slow for 256 on Hopper (flash-attention#2878).
FLASH = {
    "flash4": Flash("flash_attn.cute", "pip install 'astropt-ds[flash4]'", (9, 10), 32, 128),
    "flash3": Flash("flash_attn_interface", "hopper/ in flash-attn's repository", (9,), 8, 256),
    "flash2": Flash("flash_attn", "pip install 'astropt-ds[flash]'", (8, 9, 10, 11, 12), 8, 256),
}
# Of the packages that were found: torch.compile follows a dictionary, but no import.
FUNCTIONS = dict[str, Callable[..., Any]]()
KERNELS = (*FLASH, "cudnn", "sdpa", "eager")
REQUESTS = ("auto", "flash", *KERNELS)
# Older ones are wrong where the tokens are no multiple of 128 (pytorch#169849).
CUDNN = 91501


# torch.compile takes the answer for a constant rather than trace how it is found
@torch.compiler.assume_constant_result
def resolve_kernel(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The kernel that runs when ``requested`` is asked for.

    Args:
        requested: a kernel; ``flash``: the newest flash-attn that runs; or ``auto``: that, else
            cuDNN where torch's SDPA would take it, else that SDPA.
        device, dtype, head_dim: of queries, keys and values.

    Raises:
        UserError: it cannot run there, or there is no such kernel.
    """
    return _resolve(requested, device, dtype, head_dim)


@lru_cache
def _resolve(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if requested not in REQUESTS:
        known = ", ".join(REQUESTS)
        raise UserError(f"attention.kernel={requested}: one of {known} would be right")
    if device.type == "cuda" and (torch.backends.cudnn.version() or 0) < CUDNN:
        torch.backends.cuda.enable_cudnn_sdp(False)  # torch's own choice must not fall on it
    candidates: tuple[str, ...] = (requested,)
    if requested == "flash":
        candidates = tuple(FLASH)
    elif requested == "auto":
        cudnn = device.type == "cuda" and sdpa_backend(device, dtype, head_dim) == "cudnn"
        candidates = (*FLASH, "cudnn", "sdpa") if cudnn else (*FLASH, "sdpa")
    for kernel in candidates:
        lacks = _lacks(kernel, device, dtype, head_dim)
        if not lacks:
            return kernel
    # of several, what the last one lacks, which asks for the least
    raise UserError(f"attention.kernel={requested} needs {lacks}; auto or sdpa would be right here")


def sdpa_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Which of its back ends torch's SDPA takes in training: flash, efficient, cudnn or math."""
    q = torch.empty(1, 1, 64, head_dim, device=device, dtype=dtype, requires_grad=True)
    choice = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    return choice.name.lower().removesuffix("_attention")


def _lacks(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What a kernel needs and does not find, or nothing."""
    if kernel in ("sdpa", "eager"):
        return ""
    if device.type != "cuda":
        return f"a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "precision=bf16"
    if kernel == "cudnn":
        return _cudnn_lacks(device, dtype, head_dim)
    return _flash_lacks(kernel, device, head_dim)


def _cudnn_lacks(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    found = torch.backends.cudnn.version() or 0
    if found < CUDNN:
        return f"cuDNN {CUDNN} or later, not {found} (torch.backends.cudnn.version())"
    q = torch.empty(1, 1, 64, head_dim, device=device, dtype=dtype)
    if not can_use_cudnn_attention(SDPAParams(q, q, q, None, 0.0, True, False)):
        return f"a GPU whose cuDNN attention takes a head dimension of {head_dim}"
    return ""


def _flash_lacks(kernel: str, device: torch.device, head_dim: int) -> str:
    flash = FLASH[kernel]
    major, minor = torch.cuda.get_device_capability(device)
    if major not in flash.majors:
        listed = " or ".join(f"{known}.x" for known in flash.majors)
        return f"a GPU of compute capability {listed}, not {major}.{minor}"
    if head_dim % flash.multiple or head_dim > flash.most:
        return (
            f"a head dimension (model.width / model.heads) of {flash.most} at most, a multiple of "
            f"{flash.multiple}, not {head_dim}"
        )
    return "" if _find(kernel) else f"the package {flash.module} ({flash.source})"


def _find(kernel: str) -> bool:
    """Import a package, unless it is missing or its build does not fit this torch."""
    try:
        if kernel == "flash4":
            version("flash-attn-4")  # flash-attn 2.8 has an unfinished flash_attn.cute, too
        function = import_module(FLASH[kernel].module).flash_attn_func
    except (ImportError, AttributeError):  # flash-attn-4 alone leaves an empty flash_attn
        return False
    # it compiles its kernels in Python, which torch.compile must not look into
    FUNCTIONS[kernel] = torch.compiler.disable(function) if kernel == "flash4" else function
    return True


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, kernel: str) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1).

    Args:
        q, k, v: (batch, heads, tokens, d).
        causal: each token sees itself and those before it; otherwise all see all.
        kernel: one of :data:`KERNELS`, as :func:`resolve_kernel` returns it.

    Returns:
        (batch, heads, tokens, d).
    """
    if kernel in FLASH:
        return _flash(q, k, v, causal, kernel)
    if kernel == "cudnn" and q.shape[-2] > 1:  # it refuses a single token
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if kernel in ("cudnn", "sdpa"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if kernel == "eager":
        return _eager(q, k, v, causal)
    raise ValueError(f"kernel {kernel!r}: one of {', '.join(KERNELS)} would be right")


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, kernel: str) -> Tensor:
    # flash-attn wants (batch, tokens, heads, d); these are views, nothing is copied
    out = FUNCTIONS[kernel](q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
    # the fourth, and the third until 2025, return the log-sum-exp beside it
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(1, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(dim=-1) @ v
