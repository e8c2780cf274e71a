"""Galaxies a second of embedding on an NVIDIA GPU; -s shows them, --junitxml keeps them."""

import time
from statistics import median

import numpy as np
import pytest
import torch

from astropt_ds import Embedder, read_embeddings, save_model
from astropt_ds.config_source import load_config
from astropt_ds.embedding.job import EmbedJob
from astropt_ds.embedding.prepare import make_embedder, open_reader, prepare
from astropt_ds.embedding.run import embed
from astropt_ds.model import AstroPT
from astropt_ds.tokens import grid
from tests.conftest import blob
from tests.gpu.runs import on_gpu

pytestmark = on_gpu
TOKENS = (64, 1024)


@pytest.fixture(scope="module", params=["89m", "2100m"])
def model(request):
    return AstroPT(load_config(request.param).model).bfloat16()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def images():
    """(256, 512, 512, 3) uint8."""
    return np.stack([blob(i, 512) for i in range(32)] * 8)


@pytest.fixture
def note(request, record_property):
    """Write down a rate."""

    def write(what, rate):
        model = request.node.callspec.params["model"]
        record_property(f"{model}, {what}, galaxies a second", round(rate, 1))
        print(f"{model}, {what}: {rate:,.1f} galaxies a second")

    return write


def rate(work, rounds=3):
    """Galaxies a second of what returns their number: the median, after a round that warms up."""
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        galaxies = work()
        torch.cuda.synchronize()
        found.append(galaxies / (time.perf_counter() - start))
    return median(found[1:])


def test_64_tokens_of_decoded_stamps_are_several_times_faster_than_1024(model, images, note):
    cut = grid(512, 16, str(model.config.orientation)).cut(torch.from_numpy(images))
    rates = {}
    for tokens in TOKENS:
        embedder = Embedder(model, tokens=tokens)
        recipe = embedder.recipe(1024)
        patches = cut[:, : recipe.reads].repeat(1024 // tokens // 2 or 1, 1, 1)

        def embed_patches(embedder=embedder, recipe=recipe, patches=patches):
            embedder.embed_patches(patches, recipe)
            return len(patches)

        def embed_images(embedder=embedder):
            return len(embedder.embed(images))

        rates[tokens] = rate(embed_patches)
        note(f"{tokens} tokens of patches", rates[tokens])
        note(f"{tokens} tokens of images in memory", rate(embed_images))
    assert rates[64] > 4 * rates[1024]


@pytest.mark.parametrize("tokens", TOKENS)
def test_shards_are_embedded_whole_and_their_rate_is_noted(
    model, folder, stamps, tmp_path, tokens, note
):
    job = EmbedJob(str(folder), (str(stamps),), tmp_path / "table", tokens=tokens)
    start = time.perf_counter()
    manifest = embed(job)
    note(f"{tokens} tokens, the command", manifest.rows / (time.perf_counter() - start))
    assert manifest.rows == 320 and not manifest.failures
    table = read_embeddings(job.output, columns=["embedding"], kind="numpy")
    assert np.isfinite(np.stack(table["embedding"])).all()

    ready = prepare(job)
    reader, embedder = open_reader(ready), make_embedder(job, ready)

    def read_and_embed():
        for chunk in reader.read([(0, 0, ready.plan.rows)] * 4):
            embedder.embed_patches(torch.from_numpy(chunk.patches), ready.recipe)
        return 4 * ready.plan.rows

    try:
        note(f"{tokens} tokens from shards, all open", rate(read_and_embed))
    finally:
        reader.close()
