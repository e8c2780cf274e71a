import json

import pytest
import torch

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.model_folder.config_json import read_model_config, write_config
from astropt_ds.model_folder.release import Release

MODEL = load_config("1m", ["model.layers=1", "model.width=24", "data.image_size=48"]).model


def test_config_json_holds_all_that_the_model_needs(tmp_path):
    write_config(tmp_path, MODEL, torch.bfloat16, {"step": 7, "image_size": 48}, Release())
    assert read_model_config(tmp_path) == MODEL
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["model_type"], values["dtype"]) == ("astropt", "bfloat16")
    assert (values["generation"], values["orientation"]) == ("v1", "rows")
    assert values["training"] == {"step": 7, "image_size": 48}
    assert values["preprocessing"]["image_size"] == 48
    assert "init_from" not in values


def test_facts_that_json_cannot_hold_are_refused(tmp_path):
    for value in (float("nan"), torch.ones(1)):
        with pytest.raises(UserError, match="training facts that JSON cannot hold"):
            write_config(tmp_path, MODEL, torch.float32, {"loss": value}, Release())


@pytest.mark.parametrize(
    "tokeniser, generation", [("relu", "v1"), ("aim", "v2, v3"), ("affine", "v2, v3")]
)
def test_the_generation_is_the_tokenisers(tmp_path, tokeniser, generation):
    model = load_config("1m", [f"model.tokeniser={tokeniser}"]).model
    write_config(tmp_path, model, torch.float32, {}, Release())
    assert json.loads((tmp_path / "config.json").read_text())["generation"] == generation


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "config.json: cannot be read"),
        ("{", "not the config.json of a model folder"),
        ("[]", "not the config.json of a model folder"),
        ("{}", "missing or wrong: layers, heads, width"),
        ('{"layers": 1, "heads": 5, "width": 24}', "width=24 is no multiple of heads=5"),
    ],
)
def test_what_is_no_model_folder_is_told_in_a_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_model_config(tmp_path)
    assert "\n" not in str(caught.value)
