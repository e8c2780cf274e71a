from typing import get_args

import pytest
import torch

import astropt_ds.attention as module
from astropt_ds.attention import FLASH, REQUESTS, attention, resolve_kernel
from astropt_ds.config import AttentionConfig
from astropt_ds.errors import UserError
from tests.kernels import assert_as_exact_as_plain, assert_named_as_taken

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 256)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
HOPPER, BLACKWELL, AMPERE, VOLTA = (9, 0), (10, 0), (8, 0), (7, 0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
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


@pytest.mark.parametrize("tokens", [63, 257])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bf16_is_as_exact_as_plain_arithmetic_forward_and_backward(head_dim, causal, tokens):
    assert_as_exact_as_plain("sdpa", CPU, head_dim, tokens, causal)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager"])
def test_it_compiles_as_one_graph(kernel):
    q, k, v = (torch.randn(2, 3, 7, 16) for _ in range(3))

    def mixed(q, k, v):
        chosen = resolve_kernel(kernel, q.device, q.dtype, 16)
        return attention(q, k, v, causal=True, kernel=chosen)

    compiled = torch.compile(mixed, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), mixed(q, k, v))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_back_end_that_is_logged_is_the_one_that_torch_takes(dtype):
    assert_named_as_taken(CPU, dtype, 80)


def test_a_run_may_ask_for_what_python_may_ask_for():
    assert get_args(AttentionConfig.model_fields["kernel"].annotation) == REQUESTS


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="flash2, cudnn, sdpa, eager"):
        attention(*(torch.zeros(1, 1, 1, 8) for _ in range(3)), causal=True, kernel="fast")


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_on_a_cpu_auto_is_torchs_own(dtype):
    assert resolve_kernel("auto", CPU, dtype, 64) == "sdpa"
    assert resolve_kernel("eager", CPU, dtype, 64) == "eager"


@pytest.fixture
def machine(monkeypatch):
    """Stand-ins for a GPU and for packages: only their presence, nothing is computed with them."""
    cudnn_lacks = module._cudnn_lacks

    def set_up(capability, packages=(), torch_takes="flash", cudnn=91900):
        module._resolve.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(module, "_find", lambda kernel: kernel in packages)
        monkeypatch.setattr(module, "sdpa_backend", lambda *inputs: torch_takes)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        torch.backends.cuda.enable_cudnn_sdp(True)
        # the real one refuses an old cuDNN, but would ask torch about the GPU for a new one
        lacks = cudnn_lacks if cudnn < module.CUDNN else lambda *inputs: ""
        monkeypatch.setattr(module, "_cudnn_lacks", lacks)

    yield set_up
    module._resolve.cache_clear()
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(
    "capability, packages, head_dim, expected",
    [
        (HOPPER, FLASH, 64, "flash4"),
        (HOPPER, FLASH, 80, "flash3"),  # 2100m
        (HOPPER, FLASH, 256, "flash3"),  # 830m
        (HOPPER, ("flash4", "flash2"), 80, "flash2"),
        (BLACKWELL, FLASH, 128, "flash4"),
        (BLACKWELL, FLASH, 256, "flash2"),
        (AMPERE, FLASH, 64, "flash2"),
    ],
)
def test_the_newest_flash_attn_that_fits_gpu_and_head_runs(
    machine, capability, packages, head_dim, expected
):
    machine(capability, packages)
    for requested in ("auto", "flash", expected):
        assert resolve_kernel(requested, CUDA, BF16, head_dim) == expected
    assert resolve_kernel("auto", CUDA, FP32, head_dim) == "sdpa"


def test_without_flash_attn_cudnn_runs_where_torch_itself_prefers_it(machine):
    machine(HOPPER, torch_takes="cudnn")
    assert resolve_kernel("auto", CUDA, BF16, 80) == "cudnn"
    machine(HOPPER, torch_takes="flash")
    assert resolve_kernel("auto", CUDA, BF16, 80) == "sdpa"
    assert resolve_kernel("cudnn", CUDA, BF16, 80) == "cudnn"
    assert torch.backends.cuda.cudnn_sdp_enabled()
    machine(HOPPER, torch_takes="cudnn", cudnn=90701)
    assert resolve_kernel("sdpa", CUDA, BF16, 80) == "sdpa"
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # nor may torch take the faulty one
    machine(VOLTA, FLASH, torch_takes="efficient")
    assert resolve_kernel("auto", CUDA, torch.float16, 80) == "sdpa"


@pytest.mark.parametrize(
    "requested, device, dtype, head_dim, capability, lacks",
    [
        ("flash", CPU, BF16, 64, HOPPER, "a CUDA device, not cpu"),
        ("cudnn", CPU, BF16, 64, HOPPER, "a CUDA device, not cpu"),
        ("flash", CUDA, FP32, 64, HOPPER, "precision=bf16"),
        ("cudnn", CUDA, FP32, 64, HOPPER, "precision=bf16"),
        ("cudnn", CUDA, BF16, 64, HOPPER, "cuDNN 91501 or later, not 90701 .*"),
        ("flash3", CUDA, BF16, 64, AMPERE, r"a GPU of compute capability 9\.x, not 8\.0"),
        ("flash4", CUDA, BF16, 64, AMPERE, r"a GPU of compute capability 9\.x or 10\.x, not 8\.0"),
        ("flash4", CUDA, BF16, 80, HOPPER, "a head dimension .* a multiple of 32, not 80"),
        ("flash", CUDA, BF16, 264, HOPPER, "a head dimension .* of 256 at most.* not 264"),
        ("flash", CUDA, BF16, 80, HOPPER, r"the package flash_attn \(pip .*astropt-ds\[flash\]'\)"),
        ("flash4", CUDA, BF16, 64, HOPPER, r"the package flash_attn\.cute \(pip .*\[flash4\]'\)"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_what_it_lacks(
    machine, requested, device, dtype, head_dim, capability, lacks
):
    machine(capability, cudnn=90701)
    line = f"^attention.kernel={requested} needs {lacks}; auto or sdpa would be right here$"
    with pytest.raises(UserError, match=line):
        resolve_kernel(requested, device, dtype, head_dim)


@pytest.mark.parametrize(
    "file, text",
    [
        ("flash_attn_interface.py", "raise ImportError('undefined symbol')"),  # of another torch
        ("flash_attn_interface.py", ""),
        ("flash_attn/cute/__init__.py", "def flash_attn_func(): ..."),  # as flash-attn 2.8 has it
    ],
)
def test_a_package_that_is_broken_or_unfinished_counts_as_missing(
    monkeypatch, tmp_path, file, text
):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert not module._find("flash4" if "cute" in file else "flash3")
