"""To and from AstroPT's own implementation, PyPI's astropt 2.0.9, through files."""

import numpy as np
import pytest
import simplejpeg
import torch

from astropt_ds.benchmark.reference import reference_dataset
from astropt_ds.config_source import load_config
from astropt_ds.convert.astropt import AstroPTSource
from astropt_ds.convert.find import open_source
from astropt_ds.convert.write import write_astropt, write_model_folder
from astropt_ds.model import AstroPT, parameter_shapes
from tests.conftest import blob
from tests.unit.convert import documented

pytestmark = pytest.mark.needs("parity")


@pytest.fixture(scope="module")
def upstream():
    return pytest.importorskip("astropt.model", reason="astropt 2.0.9 is not installed")


def built(upstream, preset, tokeniser="aim"):
    """An upstream model away from its symmetric start, and the arguments it was built with."""
    config = load_config(preset).model
    images = upstream.ModalityConfig(
        name="images", input_size=768, pos_input_size=1, patch_size=16, embed_pos=True
    )
    args = {"n_layer": config.layers, "n_head": config.heads, "n_embd": config.width}
    args |= {"n_chan": 3, "block_size": 1024, "dropout": 0.0, "attn_type": "causal"}
    args |= {"modalities": [images]} | ({"tokeniser": tokeniser} if tokeniser != "aim" else {})
    registry = upstream.ModalityRegistry([images])
    torch.manual_seed(1)
    model = upstream.GPT(upstream.GPTConfig(**args), registry, master_process=False).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.005)
    return model, args


def saved(path, model, args, **more):
    """As its training script saves."""
    content = {"model": model.state_dict(), "model_args": args, "iter_num": 7, "config": {}}
    loss = np.mean([torch.tensor(0.3)])  # a numpy scalar
    content |= {"best_val_loss": loss, "modality_registry": model.modality_registry}
    torch.save({**content, **more}, path)
    return path


def predicted(model, tokens):
    with torch.no_grad():
        if isinstance(model, AstroPT):
            return model(tokens)[0]
        positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        return model({"images": tokens, "images_positions": positions})[0]["images"]


def loaded(source):
    model = AstroPT(source.model, seed=9)
    model.load_state_dict({name: source.tensor(name) for name in parameter_shapes(source.model)})
    return model.eval()


@pytest.mark.parametrize(
    "preset, tokeniser", [("1m", "aim"), ("1m", "affine"), ("21m", "aim"), ("89m", "aim")]
)
def test_weights_go_there_and_back_bit_for_bit(upstream, tmp_path, capsys, preset, tokeniser):
    from astropt.model_utils import load_astropt

    reference, args = built(upstream, preset, tokeniser)
    write_model_folder(
        open_source(saved(tmp_path / "ckpt.pt", reference, args)), tmp_path / "folder"
    )
    folder = open_source(tmp_path / "folder")
    tokens = torch.randn(1, 64, 768, generator=torch.Generator().manual_seed(1))
    expected = predicted(reference, tokens)
    rtol = 1e-6 if tokeniser == "affine" else 0  # it passes large values on
    torch.testing.assert_close(predicted(loaded(folder), tokens), expected, atol=1e-6, rtol=rtol)
    write_astropt(folder, tmp_path / "back.pt", "v2")
    back = torch.load(tmp_path / "back.pt", weights_only=False)
    state = reference.state_dict()
    assert list(back["model"]) == list(state)
    assert all(torch.equal(back["model"][name], state[name]) for name in state)
    assert back["model_args"] == args
    assert back["modality_registry"].modalities == reference.modality_registry.modalities
    # upstream's own way in, which loads with strict=True
    theirs = load_astropt(repo_id=None, path=f"{tmp_path}/", weights_filename="back.pt").eval()
    assert torch.equal(predicted(theirs, tokens), expected)


def test_a_training_goes_on_in_astropt_with_its_optimizer(upstream, tmp_path):
    def step(model, optimizer, seed):
        x = torch.randn(2, 17, 768, generator=torch.Generator().manual_seed(seed))
        positions = torch.arange(16).expand(2, -1)
        inputs = {"images": x[:, :-1], "images_positions": positions}
        optimizer.zero_grad()
        model(inputs, targets={"images": x[:, 1:]})[1].backward()
        optimizer.step()

    reference, args = built(upstream, "1m")
    settings = (0.1, 1e-3, (0.9, 0.95), "cpu")
    optimizer = reference.configure_optimizers(*settings)
    step(reference, optimizer, 1)
    step(reference, optimizer, 2)
    path = saved(tmp_path / "ckpt.pt", reference, args, optimizer=optimizer.state_dict())
    write_astropt(AstroPTSource(path), tmp_path / "v3.pt", "v3", optimizer=True)
    write_astropt(AstroPTSource(tmp_path / "v3.pt"), tmp_path / "v2.pt", "v2", optimizer=True)
    back = torch.load(tmp_path / "v2.pt", weights_only=False)
    other, _ = built(upstream, "1m")
    other.load_state_dict(back["model"], strict=True)
    resumed = other.configure_optimizers(*settings)
    resumed.load_state_dict(back["optimizer"])
    step(reference, optimizer, 3)
    step(other, resumed, 3)
    for ours, theirs in zip(other.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("generation", ["v1", "v2", "v3"])
def test_the_reading_order_survives(tmp_path, upstream, generation):
    """v2 and v3 hand the image to upstream's reader with x before y, v1 as it is."""
    state = documented.random_state(generation, 1, 32)
    path = documented.save(tmp_path / "ckpt.pt", state, documented.model_args(generation, 1, 4, 32))
    write_model_folder(open_source(path), tmp_path / "folder")
    model = loaded(open_source(tmp_path / "folder"))
    images = [blob(seed, 96) for seed in range(3)]
    files = []
    for i, image in enumerate(images):
        files.append(tmp_path / f"{i}.jpg")
        files[-1].write_bytes(simplejpeg.encode_jpeg(image, quality=95))
    pixels = np.stack([simplejpeg.decode_jpeg(file.read_bytes()) for file in files])
    assert not np.array_equal(pixels, pixels.swapaxes(1, 2))
    dataset = reference_dataset(files, tmp_path)
    axes = (2, 0, 1) if generation == "v1" else (2, 1, 0)
    expected = [
        dataset.process_galaxy(torch.from_numpy(image).permute(axes).float()) for image in pixels
    ]
    found = model.tokens(torch.from_numpy(pixels))
    # theirs has gone through fp16
    assert torch.equal(found.half(), torch.stack(expected).half())
