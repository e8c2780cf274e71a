import pytest
import torch

from astropt_ds.attention import attention, resolve_kernel
from astropt_ds.errors import UserError


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_all_kernels_compute_the_definition_and_its_gradient(head_dim, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 37, head_dim, requires_grad=True) for _ in range(3))
    weights = torch.zeros(2, 3, 37, 37)
    for i in range(37):  # row by row, without a mask
        seen = i + 1 if causal else 37
        scores = (q[..., i : i + 1, :] @ k[..., :seen, :].transpose(-1, -2)) / head_dim**0.5
        weights[..., i : i + 1, :seen] = scores.softmax(-1).detach()
    expected = weights @ v.detach()
    gradients = {}
    for kernel in ("sdpa", "eager"):
        out = attention(q, k, v, causal=causal, kernel=kernel)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
        gradients[kernel] = torch.autograd.grad(out.square().sum(), (q, k, v))
    for a, b in zip(gradients["sdpa"], gradients["eager"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_auto_says_which_kernel_runs_and_flash_says_what_it_lacks():
    cpu = torch.device("cpu")
    assert resolve_kernel("auto", cpu, torch.bfloat16) == "sdpa"
    assert resolve_kernel("eager", cpu, torch.float32) == "eager"
    with pytest.raises(UserError, match="flash needs a CUDA device, not cpu"):
        resolve_kernel("flash", cpu, torch.bfloat16)
    with pytest.raises(UserError, match="flash needs precision=bf16"):
        resolve_kernel("flash", torch.device("cuda"), torch.float32)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="flash, sdpa, eager"):
        attention(*(torch.zeros(1, 1, 1, 8) for _ in range(3)), causal=True, kernel="fast")
