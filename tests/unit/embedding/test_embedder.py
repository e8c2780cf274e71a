"""Embeddings of arrays: the numbers, and only the work that they need."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from astropt_ds import Embedder, load_model, save_model
from astropt_ds.config_source import load_config
from astropt_ds.embedding.embedder import weights_hash
from astropt_ds.errors import UserError
from astropt_ds.model import AstroPT


def tiny(tokeniser="relu", **update):
    keys = ["model.layers=3", "model.heads=2", "model.width=32", f"model.tokeniser={tokeniser}"]
    model = AstroPT(load_config("1m", keys).model.model_copy(update=update), seed=1)
    for parameter in model.parameters():  # leave the symmetric start
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    return model


def images(side=192, count=5):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("tokeniser", ["relu", "aim", "affine"])
def test_the_default_is_the_mean_of_the_generations_layer_and_tokens(tokeniser):
    model, x = tiny(tokeniser), images()
    layer, prefix = ("last", 64) if tokeniser == "relu" else ("middle", 144)
    expected = model.hidden_states(model.tokens(x), layer)[:, :prefix].mean(dim=1)
    found = Embedder(model).embed(x)
    assert found.dtype == np.float32 and found.shape == (5, 32)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [144, 160, 192])  # odd and even grids
@pytest.mark.parametrize("tokens", [1, 2, 9, 64, 81])
def test_the_central_pixels_alone_give_what_the_whole_image_does(side, tokens):
    model, x = tiny("aim"), images(side, 2)
    whole = model.hidden_states(model.tokens(x), 1).detach()[:, :tokens].numpy()
    found = Embedder(model, 1, "none", tokens).embed(x)
    np.testing.assert_allclose(found, whole, atol=1e-5, rtol=0)


def test_pixels_that_are_not_needed_are_not_looked_at():
    model, x = tiny(), images()
    embedder = Embedder(model)
    before = embedder.embed(x)
    x[:, :32] = 255 - x[:, :32]
    assert np.array_equal(embedder.embed(x), before)
    x[:, 96, 96] ^= 255
    assert not np.array_equal(embedder.embed(x), before)


def test_blocks_after_the_layer_do_not_run():
    model = tiny()
    expected = Embedder(model, 0).embed(images())
    for parameter in model.transformer.h[1:].parameters():
        parameter.data.fill_(float("nan"))
    assert np.array_equal(Embedder(model, 0).embed(images()), expected)


def test_several_layers_come_from_one_pass_and_equal_each_alone():
    model, x = tiny(), images()
    found = Embedder(model, [0, "last"], tokens=9).embed(x)
    assert list(found) == ["embedding_0", "embedding_2"]
    for layer in (0, 2):
        assert np.array_equal(
            found[f"embedding_{layer}"], Embedder(model, layer, tokens=9).embed(x)
        )


def test_batches_do_not_change_embeddings():
    model, x = tiny(), images()
    one = Embedder(model, batch=1).embed(x)
    np.testing.assert_allclose(Embedder(model, batch=3).embed(x), one, atol=1e-5, rtol=0)
    assert Embedder(model).embed(x[:0]).shape == (0, 32)


def test_full_attention_sees_the_tokens_that_are_not_pooled():
    model, x = tiny(attention="full"), images()
    expected = model.hidden_states(model.tokens(x), "last")[:, :9].mean(dim=1).detach()
    found = Embedder(model, tokens=9).embed(x)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=0)


def test_fluxes_of_any_byte_order_and_other_channels_are_embedded(tmp_path):
    keys = [
        "model.layers=1",
        "model.heads=1",
        "model.width=16",
        "model.modalities.images.channels=4",
    ]
    model = AstroPT(load_config("1m", keys).model)
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 4)).astype(">f4")
    found = Embedder(model).embed(x)
    assert np.array_equal(Embedder(model).embed(x.astype("<f4")), found)
    with pytest.raises(UserError, match="3 channels; the model reads 4"):
        Embedder(model).embed(images(64))


def test_a_model_folder_embeds_as_the_model_that_was_saved(tmp_path):
    model = tiny("aim")
    save_model(model, tmp_path / "model")
    x = images(64)
    assert np.array_equal(Embedder(tmp_path / "model").embed(x), Embedder(model).embed(x))


def test_bf16_is_near_and_leaves_the_callers_model_as_it_was():
    model, x = tiny(), images()
    exact, near = Embedder(model).embed(x), Embedder(model, precision="bf16").embed(x)
    assert near.dtype == np.float32 and not np.array_equal(near, exact)
    np.testing.assert_allclose(near, exact, atol=0.05 * np.abs(exact).max())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_models_hash_is_that_of_its_weights_whatever_holds_them(tmp_path):
    model = tiny()
    save_model(model, tmp_path / "model")
    assert weights_hash(load_model(tmp_path / "model")) == weights_hash(model)
    model.decoders["images"][0].bias.data[3] += 1e-3
    assert weights_hash(load_model(tmp_path / "model")) != weights_hash(model)


# In a process of its own, which may have little more memory than it has now.
STARVED = """
import resource, numpy as np, psutil, torch
from astropt_ds.config_source import load_config
from astropt_ds.embedding.embedder import Embedder
from astropt_ds.model import AstroPT
torch.set_num_threads(1)
model = AstroPT(load_config("1m").model)
x = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), np.uint8)
expected = Embedder(model, batch=1).embed(x)
embedder = Embedder(model, batch=64)
limit = psutil.Process().memory_info().vms + 40_000_000
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
found = embedder.embed(x)
resource.setrlimit(resource.RLIMIT_AS, before)
print(embedder.batch(64), np.abs(found - expected).max())
"""


def test_where_memory_runs_out_the_batch_is_halved_and_nothing_is_lost():
    run = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    batch, difference = run.stdout.split()
    assert 1 <= int(batch) < 64 and float(difference) < 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "abacus"}, "--device abacus: .*auto or cpu would be right"),
        ({"precision": "fp8"}, "--precision fp8: auto, fp32 or bf16"),
        ({"batch": 0}, "--batch 0: auto, or 1 or more"),
        ({"batch": "huge"}, "--batch huge"),
        ({"layer": 7}, "layer 7"),
        ({"tokens": 145}, "--tokens 145: 1 to 144"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(options, words):
    with pytest.raises(UserError, match=words):
        Embedder(tiny(), **options).embed(images())


def test_a_list_of_images_is_as_good_as_an_array():
    embedder, x = Embedder(tiny()), images()
    assert np.array_equal(embedder.embed(list(x)), embedder.embed(x))


def test_images_that_do_not_fit_the_model_are_refused():
    embedder = Embedder(tiny())
    for x, words in (
        ([images()[0], images(64)[0]], "images of several sizes"),
        (np.array([None] * 3), "images of object"),
        (np.full((1, 64, 64, 3), np.nan), "not finite"),
        (images()[0], "shape"),
        (images(100), "no whole number of 16-pixel patches"),
        (images(528, 1), "1089 tokens; the model reads 1024 at most"),
    ):
        with pytest.raises(UserError, match=words):
            embedder.embed(x)
