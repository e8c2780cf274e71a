import pytest

from astropt_ds.config_source import load_config
from astropt_ds.flops import parameters
from astropt_ds.memory import activation_bytes, gathered_weights, host_bytes, memory


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


def test_the_two_billion_model_takes_what_was_measured_of_it():
    image = activation_bytes(load_config("2100m"), 1)
    assert image == pytest.approx(1.9 * 2**30, rel=0.1)  # eager, of 1,024 tokens
