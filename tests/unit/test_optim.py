import pytest
import torch

from astropt_ds.config import OptimConfig
from astropt_ds.config_source import load_config
from astropt_ds.model import AstroPT
from astropt_ds.optim import adamw, parameter_groups


def test_only_tensors_of_two_or_more_dimensions_decay():
    model = AstroPT(load_config("1m", ["model.width=16"]).model)
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() < 2 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    positions = model.embedders["images"].wpe.weight
    assert any(p is positions for p in decayed["params"])


def test_a_partitioned_parameter_counts_by_its_logical_shape():
    model = torch.nn.Linear(3, 2)
    model.weight.ds_shape = torch.Size([2, 3])
    model.weight.data = torch.empty(0)  # what ZeRO-3 leaves
    decayed, free = parameter_groups(model, 0.1)
    assert decayed["params"] == [model.weight] and free["params"] == [model.bias]


def test_an_update_follows_the_formula_of_decoupled_weight_decay():
    model = torch.nn.Linear(4, 4, bias=False)
    before, gradient = model.weight.detach().double().clone(), torch.randn(4, 4)
    optimizer = adamw(model, OptimConfig(lr=1e-2))
    model.weight.grad = gradient.clone()
    optimizer.step()
    m = 0.1 * gradient.double() / (1 - 0.9)
    v = 0.05 * gradient.double() ** 2 / (1 - 0.95)
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * m / (v.sqrt() + 1e-8)
    assert model.weight.detach().double().sub(expected).abs().max().item() == pytest.approx(
        0, abs=1e-7
    )
