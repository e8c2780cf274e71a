import json
import math

import pytest
import torch
from safetensors.torch import load_file

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.model import AstroPT
from astropt_ds.model_folder import (
    read_model_config,
    read_weights,
    write_config,
    write_weights,
)

MODEL = load_config("1m", ["model.layers=1", "model.width=24", "data.image_size=48"]).model


def write(folder, dtype=torch.float32):
    model = AstroPT(MODEL)
    weights = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in weights.items()}
    write_weights(folder, shapes, dtype, ((n, p.detach().view(-1)) for n, p in weights.items()))
    write_config(folder, MODEL, dtype, {"step": 7})
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_safetensors_library_reads_what_was_written(tmp_path, dtype):
    model = write(tmp_path, dtype)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.to(dtype))


def test_config_json_holds_all_that_the_model_needs(tmp_path):
    model = write(tmp_path)
    config = read_model_config(tmp_path)
    assert config == MODEL
    again = AstroPT(config, seed=1)
    again.load_state_dict(dict(read_weights(tmp_path)))
    tokens = torch.randn(2, 9, 768)
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["model_type"], values["dtype"]) == ("astropt", "float32")
    assert values["training"] == {"step": 7}
    assert "init_from" not in values


def test_a_tensor_that_was_not_announced_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="b where a was announced"):
        write_weights(tmp_path, {"a": (2,)}, torch.float32, iter([("b", torch.zeros(2))]))
    with pytest.raises(ValueError):
        write_weights(tmp_path, {"a": (2,)}, torch.float32, iter([]))


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "not the config.json of a model folder"),
        (lambda f: (f / "config.json").write_text("[]"), "not the config.json of a model folder"),
        (lambda f: (f / "config.json").write_text("{}"), "not the config.json of a model folder"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "model.safetensors: cannot be read",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"x"),
            "safetensors: is no whole safetensors file",
        ),
    ],
)
def test_what_is_no_model_folder_is_told_in_a_line(tmp_path, harm, message):
    write(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read_model_config(tmp_path)
        list(read_weights(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_noticed(tmp_path):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="is no whole safetensors file"):
        list(read_weights(tmp_path))


def test_tensors_start_at_multiples_of_eight_bytes(tmp_path):
    write(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert header % 8 == 0
    parameters = sum(math.prod(p.shape) for p in AstroPT(MODEL).parameters())
    assert len(data) == 8 + header + 4 * parameters
