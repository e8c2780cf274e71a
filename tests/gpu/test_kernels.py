"""Kernels of attention on an NVIDIA GPU; what is not installed there is skipped with its reason."""

import pytest
import torch

from astropt_ds.attention import KERNELS, attention, resolve_kernel
from astropt_ds.errors import UserError
from tests.kernels import assert_as_exact_as_plain, assert_named_as_taken

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 256)  # 80 is that of 2100m, 256 of 830m
FUSED = tuple(kernel for kernel in KERNELS if kernel != "eager")
CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def resolved(kernel, head_dim, dtype=BF16):
    try:
        return resolve_kernel(kernel, CUDA, dtype, head_dim)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("tokens", [1023, 63])  # no multiple of any tile
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kernel", FUSED)
def test_bf16_is_as_exact_as_plain_arithmetic_forward_and_backward(
    kernel, head_dim, causal, tokens
):
    assert resolved(kernel, head_dim) == kernel
    assert_as_exact_as_plain(kernel, CUDA, head_dim, tokens, causal)


@pytest.mark.parametrize("kernel", FUSED)
def test_fp16_is_as_exact_as_plain_arithmetic(kernel):
    assert resolved(kernel, 64, torch.float16) == kernel
    assert_as_exact_as_plain(kernel, CUDA, 64, 1023, True, torch.float16)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_single_token_is_its_own_value(kernel):
    resolved(kernel, 64)
    q, k, v = (torch.randn(2, 3, 1, 64, device=CUDA, dtype=BF16) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, causal=True, kernel=kernel), v)


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_it_computes_the_same(kernel):
    resolved(kernel, 64)
    q, k, v = (torch.randn(2, 3, 63, 64, device=CUDA, dtype=BF16) for _ in range(3))

    def twice(q, k, v):
        chosen = resolve_kernel(kernel, q.device, q.dtype, 64)
        return 2 * attention(q, k, v, causal=True, kernel=chosen)

    torch.testing.assert_close(torch.compile(twice)(q, k, v), twice(q, k, v), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_auto_takes_the_newest_flash_attn_that_runs(head_dim):
    newest = resolved("flash", head_dim)
    assert resolve_kernel("auto", CUDA, BF16, head_dim) == newest


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_back_end_that_is_logged_is_the_one_that_torch_takes(head_dim, dtype):
    assert_named_as_taken(CUDA, dtype, head_dim)
