import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import astropt_ds
from astropt_ds.config import ModelConfig
from astropt_ds.convert.find import open_source
from astropt_ds.convert.write import write_astropt
from astropt_ds.errors import UserError
from astropt_ds.tokens import standardise
from tests.unit.model_folder.folders import galaxies, small, write

TOKENISERS = ("relu", "aim", "affine")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def same(model, other, dtype=torch.float32):
    """Whether both hold the same weights, the first in that dtype."""
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return list(ours) == list(theirs) and all(
        ours[name].dtype == dtype and torch.equal(ours[name], theirs[name].to(dtype))
        for name in theirs
    )


@pytest.mark.parametrize("tokeniser", TOKENISERS)
def test_a_saved_model_is_loaded_as_it_was(tmp_path, tokeniser):
    model = small(tokeniser)
    astropt_ds.save_model(model, tmp_path / "model")
    loaded = astropt_ds.load_model(tmp_path / "model")
    assert same(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training
    tokens = loaded.tokens(galaxies())
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16, "fp16"])
def test_any_dtype_is_loaded_from_any(tmp_path, dtype):
    model = small()
    found = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}.get(dtype, "bfloat16"))
    astropt_ds.save_model(model, tmp_path / "fp32")
    astropt_ds.save_model(model, tmp_path / "half", dtype=dtype)
    assert same(astropt_ds.load_model(tmp_path / "fp32", dtype=dtype), model, found)
    assert same(astropt_ds.load_model(tmp_path / "half"), model, found)
    again = astropt_ds.load_model(str(tmp_path / "half"), dtype="fp32")
    assert same(again, small().to(found))


@pytest.mark.parametrize("tokeniser, generation", [("relu", "v1"), ("aim", "v2"), ("affine", "v3")])
def test_an_astropt_file_loads_like_a_folder(tmp_path, tokeniser, generation):
    model = small(tokeniser)
    write(tmp_path / "model", model)
    write_astropt(open_source(tmp_path / "model"), tmp_path / "ckpt.pt", generation)
    assert same(astropt_ds.load_model(tmp_path / "ckpt.pt"), model)


def test_the_orientation_of_the_generation_decides_how_an_image_is_read():
    images = galaxies()
    # the last token but one lies beside the corner where the spiral ends
    beside, below = images[:, :16, 16:32], images[:, 16:32, :16]
    v1, v2 = small("relu").tokens(images), small("aim").tokens(images)
    assert v1.shape == v2.shape == (2, 36, 768)
    assert torch.equal(v1[:, -2], standardise(beside.reshape(2, -1)))
    assert torch.equal(v2[:, -2], standardise(below.transpose(1, 2).reshape(2, -1)))


def test_arrays_and_tensors_become_the_same_tokens():
    images = galaxies()
    rows = small("relu")
    tokens = rows.tokens(images)
    array = images.numpy()
    array.flags.writeable = False  # as arrays of Pillow's images are
    assert torch.equal(rows.tokens(array), tokens)
    turned = np.rot90(array, axes=(1, 2))  # negative strides
    assert torch.equal(rows.tokens(turned), rows.tokens(torch.rot90(images, dims=(1, 2))))
    assert torch.equal(rows.tokens(galaxies(torch.float32)), tokens)
    assert torch.equal(rows.tokens(array.astype(">f4")), tokens)  # as FITS has them


@pytest.mark.parametrize(
    "shape, message",
    [
        ((96, 96, 3), r"images of shape \[96, 96, 3\]: \(batch, side, side, channels\)"),
        ((2, 3, 96, 96), r"images of shape \[2, 3, 96, 96\]"),
        ((2, 96, 96, 4), "4 channels; the model reads 3"),
        ((2, 90, 90, 3), "90 pixels is no whole number of 16-pixel patches"),
    ],
)
@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_images_of_a_wrong_shape_are_refused(make, shape, message):
    with pytest.raises(ValueError, match=message):
        small().tokens(make(shape))


def test_what_cannot_be_loaded_is_told_in_a_line(tmp_path):
    folder, sound = (write(tmp_path / name, small()) for name in ("model", "sound"))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    for path, options, message in (
        (folder, {}, "model.safetensors: does not match the checksum in its header"),
        (tmp_path / "none", {}, "none: does not exist; a model folder"),
        (tmp_path, {}, "not recognised; a model folder"),
        (folder, {"dtype": "float64"}, "dtype=float64: one of fp32, bf16, fp16 would be right"),
        (sound, {"kernel": "fast"}, "attention.kernel=fast: one of auto, flash, flash4"),
        (sound, {"kernel": "flash2"}, "attention.kernel=flash2 needs a CUDA device, not cpu"),
        (folder, {"dtype": torch.int64}, "dtype=torch.int64: one of fp32, bf16, fp16"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            astropt_ds.load_model(path, **options)
        assert "\n" not in str(caught.value)


def test_values_that_the_dtype_cannot_hold_are_refused_and_leave_nothing(tmp_path):
    model = small()
    model.transformer.ln_f.weight.data[0] = 70_000
    with pytest.raises(UserError, match="fp16: transformer.ln_f.weight has values beyond 65504"):
        astropt_ds.save_model(model, tmp_path / "model", dtype="fp16")
    assert list(tmp_path.iterdir()) == []
    astropt_ds.save_model(model, tmp_path / "model")
    with pytest.raises(UserError, match="fp16: transformer.ln_f.weight has values beyond 65504"):
        astropt_ds.load_model(tmp_path / "model", dtype="fp16")


def test_a_compiled_model_is_saved_as_it_is_and_one_of_another_dtype_not_at_all(tmp_path):
    model = small()
    astropt_ds.save_model(torch.compile(model), tmp_path / "model")
    again = astropt_ds.load_model(tmp_path / "model")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    with pytest.raises(UserError, match="model: of a dtype other than fp32, bf16 and fp16"):
        astropt_ds.save_model(model.double(), tmp_path / "double")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_saved_model_has_its_facts_and_replaces_no_other(tmp_path):
    release = astropt_ds.Release(license="mit", datasets=("a/b",))
    facts = {"step": 3, "val_loss": 0.4}
    astropt_ds.save_model(small(), tmp_path / "model", training=facts, release=release)
    training = json.loads((tmp_path / "model" / "config.json").read_text())["training"]
    assert facts.items() <= training.items()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license: mit\n" in card and "- a/b\n" in card
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(UserError, match="model: cannot be written"):
        astropt_ds.save_model(small("relu"), tmp_path / "model")
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


@pytest.fixture(scope="module")
def cached(hub_cache):
    """Puts a folder into the hub's cache as a download does; returns what is there."""

    def put(repository, folder, reference="main", commit=COMMIT):
        place = hub_cache / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / reference).write_text(commit)
        snapshot = place / "snapshots" / commit
        for number, file in enumerate(folder.iterdir()):
            blob = place / "blobs" / f"{commit[:30]}{number:010d}"
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(file.read_bytes())
            snapshot.mkdir(parents=True, exist_ok=True)
            (snapshot / file.name).symlink_to(blob)
        return snapshot

    return put


@pytest.mark.needs("hub")
def test_an_id_of_the_hub_loads_from_its_cache_without_a_network(cached, tmp_path):
    first, second = small("relu"), small("aim")
    cached("astro/galaxies-1m", write(tmp_path / "first", first))
    other = COMMIT[::-1]
    cached("astro/galaxies-1m", write(tmp_path / "second", second), "v2.0", other)
    assert same(astropt_ds.load_model("astro/galaxies-1m"), first)
    assert same(astropt_ds.load_model("astro/galaxies-1m@v2.0"), second)
    assert same(astropt_ds.load_model(f"astro/galaxies-1m@{other}"), second)


def test_a_path_that_exists_is_no_id(tmp_path, monkeypatch):
    write(tmp_path / "astro" / "local", model := small())
    monkeypatch.chdir(tmp_path)
    assert same(astropt_ds.load_model("astro/local"), model)


@pytest.mark.needs("hub")
def test_an_id_without_a_model_is_told_in_a_line(cached, tmp_path):
    folder = write(tmp_path / "model", small())
    (folder / "config.json").unlink()
    cached("astro/no-config", folder)
    neither = "no such path here, and as an id of the Hugging Face hub not to be had: "
    for hub_id, message in (
        ("astro/nowhere", f"astro/nowhere: {neither}"),
        ("astro/no-config@v9", f"astro/no-config@v9: {neither}"),
        ("astro/..bad", f"astro/..bad: {neither}"),
        ("astro/no-config", "astro/no-config: has no config.json"),
    ):
        with pytest.raises(UserError) as caught:
            astropt_ds.load_model(hub_id)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_an_id_without_the_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'astropt-ds\[hub\]'"):
        astropt_ds.load_model("astro/galaxies-1m")


def test_what_is_imported_is_what_is_asked_for():
    code = (
        "import sys, astropt_ds.errors\n"
        "assert {'load_model', 'save_model', 'Release'} <= set(dir(astropt_ds))\n"
        "assert 'torch' not in sys.modules\n"
        "from astropt_ds import load_model\n"
        "assert load_model is sys.modules['astropt_ds.convert.load'].load_model\n"
        "assert not {'deepspeed', 'huggingface_hub', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'load_models'"):
        astropt_ds.load_models  # noqa: B018


def test_a_loaded_model_is_saved_as_it_came(tmp_path):
    model = small()
    write(tmp_path / "a", model)
    loaded = astropt_ds.load_model(tmp_path / "a")
    assert isinstance(loaded.config, ModelConfig)
    astropt_ds.save_model(loaded, tmp_path / "b")
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert a == b
