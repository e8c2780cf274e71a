import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astropt_ds.blocks import block_function
from astropt_ds.config_source import load_config
from astropt_ds.flops import (
    backward_parts,
    causal_excess,
    causal_training_flops,
    embedding_flops,
    forward_flops,
    forward_parts,
    hardware_flops,
    palm_flops_per_token,
    parameters,
    peak_flops,
    recomputed_parts,
    training_flops,
    utilisation,
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


@pytest.mark.parametrize("tokeniser", ["relu", "aim", "affine"])
@pytest.mark.parametrize("side, patch", [(96, 16), (64, 8)])
def test_parts_are_what_the_counter_gives_to_the_modules(tokeniser, side, patch):
    keys = [f"model.tokeniser={tokeniser}", f"model.modalities.images.patch={patch}"]
    config = load_config("5m", [*keys, f"data.image_size={side}"])
    tokens, values = config.tokens_per_image, config.model.images.input_size
    with torch.device("meta"):
        model = AstroPT(config.model, kernel="eager")
        x = torch.empty(1, tokens, values)
    with FlopCounterMode(display=False) as counter:
        model(x)
    found = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    parts = forward_parts(config.model, tokens)
    assert found["AstroPT.encoders.images"] == parts["tokeniser"]
    assert found["AstroPT.decoders.images"] == parts["head"]
    assert found["AstroPT.transformer"] == parts["attention"] + parts["mlp"]
    with FlopCounterMode(display=False) as counter:
        model.transformer(torch.empty(1, tokens, 256, device="meta"), 2)
    two = forward_parts(config.model, tokens, blocks=2, head=False)
    assert counter.get_total_flops() == two["attention"] + two["mlp"]
    assert two["mlp"] == 2 * 2 * tokens * 8 * 256 * 256


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_is_recomputed_is_counted_as_it_happens(recompute):
    config = load_config("5m").model
    with torch.device("meta"):
        model = AstroPT(config, kernel="eager")
        x = torch.empty(1, 64, 768)
    model.run_blocks_as(block_function(recompute))
    with FlopCounterMode(display=False) as counter:
        _, loss = model(x[:, :-1], x[:, 1:])
    assert counter.get_total_flops() == sum(forward_parts(config, 63).values())
    with counter:
        loss.backward()
    again = sum(recomputed_parts(config, 63, recompute).values())
    assert counter.get_total_flops() == sum(backward_parts(config, 63).values()) + again
    assert hardware_flops(config, 64, recompute) == training_flops(config, 64) + again
    assert (again > 0) == (recompute == "full")


def test_the_causal_half_counts_each_pair_of_tokens_that_see_each_other():
    config = load_config("5m").model
    pairs = sum(i + 1 for i in range(63))  # token i sees i + 1
    products = 2 * 2 * 256  # q k^T and its product with v
    whole = 63 * 63
    assert causal_excess(config, 63) == 6 * (whole - pairs) * products
    assert causal_training_flops(config, 64) == training_flops(config, 64) - 3 * causal_excess(
        config, 63
    )
    full = sum(forward_parts(config, 63, blocks=4, head=False).values())
    assert embedding_flops(config, 63, 4) == full - causal_excess(config, 63, 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_papers_totals(preset):
    config = load_config(preset)
    tokens = 320 * 1024 * 30_000
    six_nd, palm = PAPER[preset]
    assert 6 * parameters(config.model, positions=False) * tokens == pytest.approx(six_nd, rel=5e-3)
    assert palm_flops_per_token(config.model, 1024) * tokens == pytest.approx(palm, rel=5e-3)


def test_utilisation_is_palms_over_the_devices_peak():
    config = load_config("2100m")
    assert palm_flops_per_token(config.model, 1024) == pytest.approx(13.31e9, rel=1e-3)
    one = utilisation(config, 37_200, "NVIDIA H200", 1)
    assert one["mfu"] == pytest.approx(0.50, abs=0.002)
    assert utilisation(config, 2 * 37_200, "NVIDIA H200", 2) == pytest.approx(one)
    assert set(utilisation(config, 37_200, "cpu", 1).values()) == {None}


def test_utilisation_tells_needed_work_from_work_done():
    again = utilisation(load_config("2100m", ["recompute=full"]), 37_200, "NVIDIA H200", 1)
    once = utilisation(load_config("2100m"), 37_200, "NVIDIA H200", 1)
    assert again["mfu"] == once["mfu"] and again["hfu"] > 1.2 * once["hfu"]
    attention = 6 * 26 * 2560 * 1024 * 37_200 / 989.4e12
    assert once["mfu"] - once["mfu_causal"] == pytest.approx(attention)


def test_peaks_are_of_the_device_and_the_precision():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("NVIDIA A10G") == 70e12 and peak_flops("NVIDIA A10") == 125e12
    assert peak_flops("NVIDIA GH200 480GB") == 989.4e12
    assert peak_flops("NVIDIA RTX A4000") is peak_flops("NVIDIA RTX A1000 Laptop GPU") is None
    assert peak_flops("Tesla V100-SXM2-16GB") is None  # it has no bf16
    assert peak_flops("cpu") is None
