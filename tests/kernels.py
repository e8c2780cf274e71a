"""What a kernel of attention computes, beside plain arithmetic."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from astropt_ds.attention import attention, sdpa_backend


def computed(kernel, qkv, weights, causal):
    """Output (batch, heads, tokens, d), and the gradient of its weighted sum like qkv, in fp32."""
    qkv = qkv.detach().requires_grad_()
    # views of one projection, as in the model
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = attention(q, k, v, causal=causal, kernel=kernel)
    (gradient,) = torch.autograd.grad((out.float() * weights).sum(), qkv)
    return out.detach().float(), *gradient.float().unbind(2)


def assert_as_exact_as_plain(kernel, device, head_dim, tokens, causal, dtype=torch.bfloat16):
    """Output and gradients in half precision are no farther from fp32 than plain arithmetic's.

    Three times as far is allowed, as flash-attn's own tests do: roundings differ.
    """
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3, 4, head_dim, device=device).to(dtype)
    weights = torch.randn(2, 4, tokens, head_dim, device=device)
    exact = computed("eager", qkv.float(), weights, causal)
    plain = computed("eager", qkv, weights, causal)
    found = computed(kernel, qkv, weights, causal)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=True):
        error, usual = (a - c).abs().max().item(), (b - c).abs().max().item()
        assert error <= 3 * usual + 1e-4, f"{name}: {error:.2g} from fp32, plain {usual:.2g}"


def assert_named_as_taken(device, dtype, head_dim):
    """The back end that is named for torch's SDPA is the one that it takes."""
    backend = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }[sdpa_backend(device, dtype, head_dim)]
    q, k, v = (
        torch.randn(2, 3, 63, head_dim, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    found = attention(q, k, v, causal=True, kernel="sdpa")
    with sdpa_kernel(backend):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(found, expected) and type(found.grad_fn) is type(expected.grad_fn)
