import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from astropt_ds.blocks import Block, block_forward, block_function
from astropt_ds.config_source import load_config
from astropt_ds.layers import Init
from astropt_ds.model import AstroPT


def config(*overrides):
    return load_config("1m", ["model.layers=2", "model.width=32", *overrides]).model


def textbook(block, x):
    """The block of its modules, one after another (Radford et al. 2019)."""
    attn, heads = block.attn, block.heads
    batch, tokens, width = x.shape
    qkv = attn.c_attn(block.ln_1(x))
    q, k, v = (
        part.view(batch, tokens, heads, width // heads).transpose(1, 2)
        for part in qkv.split(width, dim=-1)
    )
    scores = q @ k.transpose(-2, -1) / (width // heads) ** 0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    x = x + attn.c_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
    return x + block.mlp(block.ln_2(x))


def test_the_function_is_the_block_of_its_modules():
    block = Block(config(), "eager", Init(0, 2))
    for name, parameter in block.named_parameters():
        if "ln" in name:
            nn.init.normal_(parameter)
    x = torch.randn(3, 17, 32)
    torch.testing.assert_close(block(x), textbook(block, x), atol=1e-6, rtol=1e-5)


def losses_and_gradients(recompute, compiled, kernel):
    model = AstroPT(config(), kernel=kernel)
    model.run_blocks_as(block_function(recompute, compiled))
    x = torch.randn(2, 17, 768, generator=torch.Generator().manual_seed(0))
    _, loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute, kernel):
    expected = losses_and_gradients("none", False, kernel)
    found = losses_and_gradients(recompute, False, kernel)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def kept_bytes(recompute):
    """What autograd keeps of a block for its backward pass."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    block = Block(config(), "sdpa", Init(0, 2))
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    block.run = block_function(recompute)
    x = torch.randn(2, 64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    del out
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_recomputing_all_keeps_the_blocks_input_alone():
    assert kept_bytes("full") == 2 * 64 * 32 * 4 < kept_bytes("none") / 10


class Attended(TorchDispatchMode):
    """Counts the runs of fused attention's forward pass."""

    times = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        self.times += "attention" in name and "backward" not in name
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute, times", [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_recomputation_does_not_attend_again(recompute, times):
    block = Block(config(), "sdpa", Init(0, 2))
    block.run = block_function(recompute)
    x = torch.randn(2, 17, 32, requires_grad=True)
    with Attended() as attended:
        block(x).sum().backward()
    assert attended.times == times


def test_a_compiled_block_is_one_graph():
    torch._dynamo.reset()
    explained = torch._dynamo.explain(block_forward)
    block = Block(config(), "sdpa", Init(0, 2))
    found = explained(
        *(torch.randn(2, 17, 32), block.heads, True, "sdpa"),
        *(block.ln_1.weight, block.attn.c_attn.weight, block.attn.c_proj.weight),
        *(block.ln_2.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight),
    )
    assert (found.graph_count, found.graph_break_count) == (1, 0)
