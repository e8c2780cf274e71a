import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astropt_ds.config_source import load_config
from astropt_ds.flops import (
    forward_flops,
    mfu,
    palm_flops_per_token,
    parameters,
    peak_flops,
    training_flops,
)
from astropt_ds.model import AstroPT

PRESETS = ("1m", "5m", "12m", "21m", "89m", "309m", "830m", "2100m")
# AstroPT's axis: 6 N tokens, and PaLM's count, over 30,000 steps of 320 images
PAPER = {
    "1m": (6.30e16, 1.25e17),
    "5m": (3.21e17, 5.07e17),
    "12m": (7.05e17, 9.83e17),
    "21m": (1.24e18, 1.61e18),
    "89m": (5.26e18, 6.37e18),
    "309m": (1.82e19, 2.12e19),
    "830m": (4.89e19, 5.29e19),
    "2100m": (1.23e20, 1.31e20),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tokeniser", ["relu", "aim", "affine"])
def test_the_count_is_torchs_to_the_integer(preset, tokeniser):
    config = load_config(preset, [f"model.tokeniser={tokeniser}"]).model
    tokens = 64
    with torch.device("meta"):
        model = AstroPT(config, kernel="eager")
        x = torch.empty(1, tokens, 768)
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        _, loss = model(x[:, :-1], x[:, 1:])
    assert forward_flops(config, tokens - 1) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        _, loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
    assert training_flops(config, tokens) == counter.get_total_flops()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_papers_totals(preset):
    config = load_config(preset)
    tokens = 320 * 1024 * 30_000
    six_nd, palm = PAPER[preset]
    assert 6 * parameters(config.model, positions=False) * tokens == pytest.approx(six_nd, rel=5e-3)
    assert palm_flops_per_token(config.model, 1024) * tokens == pytest.approx(palm, rel=5e-3)


def test_utilisation_is_palms_over_the_devices_peak():
    model = load_config("2100m").model
    assert palm_flops_per_token(model, 1024) == pytest.approx(13.31e9, rel=1e-3)
    assert mfu(model, 1024, 37_200, "NVIDIA H200", 1) == pytest.approx(0.50, abs=0.002)
    assert mfu(model, 1024, 2 * 37_200, "NVIDIA H200", 2) == pytest.approx(0.50, abs=0.002)
    assert mfu(model, 1024, 37_200, "cpu", 1) is None
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
