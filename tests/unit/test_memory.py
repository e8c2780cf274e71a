import pytest
import torch

from astropt_ds.blocks import Block, block_function
from astropt_ds.config_source import load_config
from astropt_ds.flops import parameters
from astropt_ds.layers import Init
from astropt_ds.memory import (
    activation_bytes,
    block_bytes,
    gathered_weights,
    host_bytes,
    memory,
)


def plan(*overrides, ranks=8, micro=1, per_node=8):
    return memory(load_config("2100m", list(overrides)), ranks, micro, True, per_node)


@pytest.mark.parametrize(
    "stage, offload, each",
    [
        (1, "false", 2 + 2 + 12 / 8),
        (2, "false", 2 + 2 / 8 + 12 / 8),
        (3, "false", 16 / 8),
    ],
)
def test_each_stage_of_zero_splits_more_of_the_sixteen_bytes_a_parameter(stage, offload, each):
    count = parameters(load_config("2100m").model)
    keys = (f"zero.stage={stage}", f"zero.offload={offload}")
    assert plan(*keys).state == pytest.approx(count * each)
    assert plan(*keys, ranks=1).state == pytest.approx(count * 16)


def test_what_is_offloaded_lies_in_the_hosts_memory():
    config = load_config("2100m", ["zero.stage=3", "zero.offload=true"])
    count = parameters(config.model)
    there = plan("zero.stage=3", "zero.offload=true")
    assert (there.weights, there.optimizer) == (0, 0) and there.peak < plan("zero.stage=3").peak
    assert host_bytes(config, 8) == pytest.approx(count * 16 / 8)
    assert host_bytes(load_config("2100m"), 8) == 0


def test_copies_within_a_node_are_of_all_weights():
    count = parameters(load_config("2100m").model)
    more = plan("zero.hpz=true", ranks=32).weights - plan(ranks=32).weights
    assert more == pytest.approx(2 * count / 8)
    assert plan("zero.hpz=true", ranks=32, per_node=1) == plan(ranks=32, per_node=1)


def test_only_several_ranks_gather_weights():
    config = load_config("2100m")
    assert gathered_weights(config, 1, {}) == 0
    small = load_config("21m")
    assert gathered_weights(small, 2, {}) == 2 * parameters(small.model)
    assert gathered_weights(config, 2, {}) < parameters(config.model)


@pytest.mark.parametrize("tokeniser", ["relu", "aim", "affine"])
def test_activations_grow_with_the_micro_batch_and_shrink_with_recomputation(tokeniser):
    def kept(recompute, micro):
        keys = [f"recompute={recompute}", f"model.tokeniser={tokeniser}"]
        return activation_bytes(load_config("309m", keys), micro)

    for recompute in ("none", "selective", "full"):
        assert kept(recompute, 8) == pytest.approx(8 * kept(recompute, 1))
    assert kept("none", 4) > kept("selective", 4) > kept("full", 4)


def kept_by_autograd(kernel, recompute):
    """Bytes a token of what a block leaves for its backward pass, in fp32."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = load_config("1m", ["model.width=64", "model.heads=4"]).model
    block = Block(model, kernel, Init(0, 4))
    block.run = block_function(recompute)
    x = torch.randn(2, 128, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    del out
    return model, sum(n for place, n in kept.items() if place not in weights) / (2 * 128)


@pytest.mark.parametrize("kernel, scores", [("sdpa", 0), ("eager", 128 * (4 * 4 + 1))])
def test_a_block_keeps_what_autograd_does(kernel, scores):
    model, kept = kept_by_autograd(kernel, "none")
    assert block_bytes(model, 4, "none", scores)[0] == pytest.approx(kept, rel=0.02)
    model, kept = kept_by_autograd(kernel, "full")
    assert block_bytes(model, 4, "full", scores)[0] == kept


def test_eager_attention_is_planned_with_its_scores():
    fused, eager = (load_config("2100m", [f"attention.kernel={k}"]) for k in ("sdpa", "eager"))
    more = activation_bytes(eager, 1) - activation_bytes(fused, 1)
    assert more > 26 * 32 * 1023**2 * 2


def test_the_two_billion_model_takes_what_was_measured_of_it():
    image = activation_bytes(load_config("2100m"), 1)
    assert image == pytest.approx(1.9 * 2**30, rel=0.1)  # eager, of 1,024 tokens
