"""The model folder in plain transformers, which knows nothing of this package."""

import ast
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from astropt_ds.model import AstroPT
from astropt_ds.model_folder.config_json import read_model_config
from astropt_ds.model_folder.remote_code import remote_code
from astropt_ds.model_folder.weights import StoredWeights, write_weights
from tests.unit.model_folder.folders import galaxies, small, write

TOKENISERS = ("relu", "aim", "affine")
needs_hub = pytest.mark.needs("hub")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and its folder for each tokeniser. Not to be changed: copy them."""
    place = tmp_path_factory.mktemp("folders")
    models = {name: small(name) for name in TOKENISERS}
    return {name: (model, write(place / name, model)) for name, model in models.items()}


@pytest.fixture(scope="module")
def auto(transformers):
    """``AutoModel.from_pretrained`` of a folder."""

    def load(folder, **options):
        return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **options)

    return load


@torch.no_grad()
def outputs(model):
    """All that a model computes from images."""
    tokens = model.tokens(galaxies())
    predictions, loss = model(tokens[:, :-1], tokens[:, 1:], torch.tensor([1.0, 0.0]))
    states = [model.hidden_states(tokens, layer, 7) for layer in (0, "middle", "last")]
    return [tokens, predictions, loss, model(tokens)[0], *states]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@needs_hub
@pytest.mark.parametrize("tokeniser", TOKENISERS)
def test_transformers_fills_every_parameter_and_computes_what_the_model_does(
    folders, auto, tokeniser
):
    model, folder = folders[tokeniser]
    loaded, found = auto(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert not loaded.training
    state = loaded.state_dict()
    assert list(state) == [name for name, _ in model.named_parameters()]
    assert same(state.values(), model.parameters())
    assert same(outputs(model), outputs(loaded))


@needs_hub
def test_weights_in_several_files_load_alike(folders, auto, tmp_path):
    model, folder = folders["relu"]
    several = shutil.copytree(folder, tmp_path / "several")
    (several / "model.safetensors").unlink()
    parameters = [(name, p.detach()) for name, p in model.named_parameters()]
    write_weights(several, model.config, torch.float32, parameters, shard_bytes=100_000)
    assert len(list(several.glob("*.safetensors"))) > 2
    assert same(outputs(auto(several)), outputs(model))


@needs_hub
def test_patches_and_channels_are_those_of_the_model(auto, tmp_path):
    modality = ("model.modalities.images.patch=8", "model.modalities.images.channels=5")
    model = small("affine", *modality)
    loaded = auto(write(tmp_path / "model", model))
    fluxes = torch.randn(2, 24, 24, 5, generator=torch.Generator().manual_seed(2))
    tokens = loaded.tokens(fluxes)
    assert tokens.shape == (2, 9, 320)
    assert torch.equal(tokens, model.tokens(fluxes))
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])


@needs_hub
def test_another_dtype_is_the_same_cast(folders, auto):
    folder = folders["aim"][1]
    loaded = auto(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert same(outputs(small("aim").bfloat16()), outputs(loaded))


@needs_hub
@pytest.mark.parametrize("tokeniser", TOKENISERS)
def test_what_transformers_saves_both_read_again(folders, auto, tmp_path, tokeniser):
    model, folder = folders[tokeniser]
    auto(folder).save_pretrained(tmp_path / "a")
    again = auto(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert same(outputs(model), outputs(again))
    assert read_model_config(tmp_path / "b") == model.config
    weights = StoredWeights(tmp_path / "b", model.config)
    assert all(torch.equal(weights.tensor(name), p) for name, p in model.named_parameters())


@needs_hub
def test_weights_that_a_file_lacks_are_not_made_up(folders, auto, tmp_path):
    model, folder = folders["relu"]
    harmed = write(tmp_path / "harmed", model)
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, harmed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the file lacks weights of transformer\.h\.1\.mlp\.c_fc"):
        auto(harmed)


@needs_hub
def test_a_new_model_of_a_configuration_begins_as_the_packages_own(folders, transformers):
    model, folder = folders["aim"]
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    new = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert same(AstroPT(model.config).parameters(), new.parameters())


def test_the_code_needs_torch_numpy_and_transformers_alone(folders):
    _, folder = folders["relu"]
    code = (folder / "modeling_astropt.py").read_text()
    packages = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            packages.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
    # flash-attn is looked for by its name, and done without
    assert packages - sys.stdlib_module_names == {"torch", "numpy", "transformers"}


def test_the_code_lacks_no_definition_and_has_none_for_nothing():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,B"]
    options = ["--line-length", "100", "-"]
    done = subprocess.run([*command, *options], input=remote_code(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    names = {node.name for node in ast.parse(remote_code()).body if hasattr(node, "name")}
    assert {"standardise", "AstroPT", "AstroPTModel"} <= names
    assert not {"centre_crop", "destandardise", "parameter_shapes", "run_cli"} & names


def test_config_json_names_the_classes_of_the_code(folders):
    config = json.loads((folders["relu"][1] / "config.json").read_text())
    definitions = [node for node in ast.parse(remote_code()).body if isinstance(node, ast.ClassDef)]
    classes = [f"modeling_astropt.{node.name}" for node in definitions]
    named = [*config["auto_map"].values(), f"modeling_astropt.{config['architectures'][0]}"]
    assert set(named) == {classes[-2], classes[-1]}
