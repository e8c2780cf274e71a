import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from astropt_ds.config_source import load_config
from astropt_ds.model import AstroPT, huber_per_image

# AstroPT's parameter counts with positions: relu (v1), aim (v2, v3), affine (v3)
COUNTS = {
    "1m": (1_198_592, 1_836_160, 1_115_264),
    "5m": (5_707_008, 7_081_216, 5_377_280),
    "12m": (12_344_832, 14_553_984, 11_604_864),
    "21m": (21_505_792, 24_648_192, 20_191_744),
    "89m": (89_873_664, 95_177_472, 86_919_936),
    "309m": (309_910_272, 317_768_704, 304_661_504),
    "830m": (831_599_360, 853_608_448, 810_616_832),
    "2100m": (2_084_194_048, 2_115_637_760, 2_051_412_480),
}
TOKENISERS = ("relu", "aim", "affine")


def config(preset="1m", *overrides):
    return load_config(preset, list(overrides)).model


def small(tokeniser="aim", *overrides):
    shape = ("model.layers=3", "model.heads=4", "model.width=32")
    return config("1m", f"model.tokeniser={tokeniser}", *shape, *overrides)


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts_are_those_of_the_paper(preset):
    for tokeniser, expected in zip(TOKENISERS, COUNTS[preset], strict=True):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            with torch.device("meta"):
                model = AstroPT(config(preset, f"model.tokeniser={tokeniser}"))
            seconds.append(time.perf_counter() - start)
        assert sum(p.numel() for p in model.parameters()) == expected
        assert min(seconds) < 0.1  # milliseconds: nothing is drawn on the meta device


@pytest.mark.parametrize("tokeniser", TOKENISERS)
def test_initial_weights_have_the_statistics_of_gpt2(tokeniser):
    model = AstroPT(config("5m", f"model.tokeniser={tokeniser}"), seed=1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif ".ln_" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / (2 * 6) ** 0.5 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name


def test_a_weight_depends_on_its_name_and_the_seed_alone():
    shallow, deep = AstroPT(small(), seed=3), AstroPT(small("aim", "model.layers=5"), seed=3)
    name = "transformer.h.1.attn.c_attn.weight"
    assert torch.equal(shallow.state_dict()[name], deep.state_dict()[name])
    torch.manual_seed(7)  # the global generator plays no part
    assert torch.equal(AstroPT(small(), seed=3).state_dict()[name], shallow.state_dict()[name])
    assert not torch.equal(AstroPT(small(), seed=4).state_dict()[name], shallow.state_dict()[name])
    other = shallow.state_dict()["transformer.h.2.attn.c_attn.weight"]
    assert not torch.equal(other, shallow.state_dict()[name])


@pytest.mark.parametrize("tokens", [15, 255])
def test_the_relu_generation_follows_its_formulas(tokens):
    """AstroPT v1 restated from its description, weights taken by name."""
    model = AstroPT(small("relu"), seed=0)
    for p in model.parameters():  # leave the symmetric point: biases and norms matter too
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    w = dict(model.named_parameters())
    x = torch.randn(2, tokens + 1, 768)

    def linear(y, name):
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(y, name):
        centred = y - y.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    h = F.relu(linear(F.relu(linear(x[:, :-1], "encoders.images.0")), "encoders.images.2"))
    h = h + w["embedders.images.wpe.weight"][:tokens]
    for i in range(3):
        block = f"transformer.h.{i}"
        qkv = norm(h, f"{block}.ln_1.weight") @ w[f"{block}.attn.c_attn.weight"].T
        q, k, v = qkv.split(32, dim=-1)
        mixed = []
        for head in range(4):
            part = slice(head * 8, (head + 1) * 8)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5
            future = torch.full((tokens, tokens), float("-inf")).triu(1)
            mixed.append((scores + future).softmax(-1) @ v[..., part])
        h = h + torch.cat(mixed, -1) @ w[f"{block}.attn.c_proj.weight"].T
        u = norm(h, f"{block}.ln_2.weight") @ w[f"{block}.mlp.c_fc.weight"].T
        gelu = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
        h = h + gelu @ w[f"{block}.mlp.c_proj.weight"].T
    h = norm(h, "transformer.ln_f.weight")
    h = F.relu(linear(h, "decoders.images.0"))
    expected = linear(F.relu(linear(h, "decoders.images.2")), "decoders.images.4")

    predictions, loss = model(x[:, :-1], x[:, 1:])
    torch.testing.assert_close(predictions, expected, atol=1e-5, rtol=1e-5)
    error = (expected - x[:, 1:]).abs()
    huber = torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()
    assert loss.item() == pytest.approx(huber.item(), abs=1e-6)


@pytest.mark.parametrize("tokeniser", TOKENISERS)
def test_no_prediction_depends_on_a_later_token(tokeniser):
    model = AstroPT(small(tokeniser))
    x = torch.randn(1, 20, 768)
    before, _ = model(x)
    x[:, 11:] += 1.0
    after, _ = model(x)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


def test_full_attention_sees_later_tokens():
    model = AstroPT(small().model_copy(update={"attention": "full"}))
    x = torch.randn(1, 20, 768)
    before, _ = model(x)
    x[:, 11:] += 1.0
    assert not torch.equal(before[:, :11], model(x)[0][:, :11])
    with pytest.raises(ValueError, match="causal attention only"):
        model.hidden_states(x, prefix=4)


def test_hidden_states_stop_at_their_layer_and_prefix():
    model = AstroPT(small())
    ran = []
    for module in model.modules():
        if not isinstance(module, (nn.ModuleDict, nn.ModuleList)):
            module.register_forward_hook(lambda m, _, out: ran.append((m, out.shape[-2])))
    x = torch.randn(2, 30, 768)
    for layer, blocks in (("last", 3), ("middle", 2), (0, 1), (-3, 1), (2, 3)):
        ran.clear()
        whole = model.hidden_states(x, layer)
        ran.clear()
        prefix = model.hidden_states(x, layer, prefix=9)
        torch.testing.assert_close(prefix, whole[:, :9], atol=1e-6, rtol=1e-5)
        modules = {id(module) for module, _ in ran}
        assert [id(b) in modules for b in model.transformer.h] == [i < blocks for i in range(3)]
        assert id(model.transformer.ln_f) not in modules
        assert not modules & {id(m) for m in model.decoders["images"].modules()}
        assert {tokens for _, tokens in ran} == {9}


def test_the_last_hidden_state_is_what_the_head_reads():
    model = AstroPT(small())
    x = torch.randn(2, 30, 768)
    head = model.decoders["images"](model.transformer.ln_f(model.hidden_states(x, "last")))
    assert torch.equal(head, model(x)[0])


@pytest.mark.parametrize("layer", [3, -4, "first", 1.5])
def test_an_unknown_layer_is_refused(layer):
    with pytest.raises(ValueError, match="'last', 'middle' or a number from -3 to 2"):
        AstroPT(small()).hidden_states(torch.randn(1, 4, 768), layer)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="17 tokens; model.block_size=16"):
        AstroPT(small("aim", "model.block_size=16", "data.image_size=64"))(torch.zeros(1, 17, 768))


def test_an_image_of_weight_zero_leaves_the_others_and_the_denominator_as_they_are():
    model = AstroPT(small())
    x = torch.randn(4, 10, 768)
    each = huber_per_image(model(x[:, :-1])[0], x[:, 1:])
    _, loss = model(x[:, :-1], x[:, 1:], torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert loss.item() == pytest.approx((each.sum() - each[1]).item() / 4, abs=1e-6)
    _, unweighted = model(x[:, :-1], x[:, 1:])
    assert unweighted.item() == pytest.approx(each.mean().item(), abs=1e-7)


def test_kernels_change_nothing_but_rounding():
    x = torch.randn(2, 50, 768)
    outputs = [AstroPT(small(), seed=0, kernel=k)(x)[0] for k in ("auto", "sdpa", "eager")]
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[1], outputs[2], atol=1e-5, rtol=1e-5)
