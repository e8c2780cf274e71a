"""The model on an NVIDIA GPU, beside the processor and beside fp32."""

import pytest
import torch

import astropt_ds
from astropt_ds.config_source import load_config
from astropt_ds.model import AstroPT
from tests.gpu.runs import on_gpu

pytestmark = on_gpu


def test_a_model_loaded_to_the_gpu_reads_images_as_on_the_cpu(tmp_path):
    astropt_ds.save_model(AstroPT(load_config("5m").model), tmp_path / "model")
    images = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    ours, theirs = (astropt_ds.load_model(tmp_path / "model", device=d) for d in ("cpu", "cuda"))
    tokens = theirs.tokens(images)
    torch.testing.assert_close(tokens.cpu(), ours.tokens(images), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tokens)[0].cpu(), ours(tokens.cpu())[0], atol=1e-3, rtol=1e-3
        )
    astropt_ds.save_model(theirs, tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("tokeniser", ["relu", "aim", "affine"])
def test_the_bf16_loss_follows_fp32(tokeniser):
    config = load_config("21m", [f"model.tokeniser={tokeniser}"]).model
    model = AstroPT(config).cuda()
    x = torch.randn(4, 1024, 768, device="cuda")
    _, expected = model(x[:, :-1], x[:, 1:])
    _, found = model.bfloat16()(x[:, :-1], x[:, 1:])
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
