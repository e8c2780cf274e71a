"""Embeddings on an NVIDIA GPU: near those of the processor, whatever the batch."""

import numpy as np
import pytest
import torch

from astropt_ds import Embedder, read_embeddings, save_model
from astropt_ds.config_source import load_config
from astropt_ds.embedding.job import EmbedJob
from astropt_ds.embedding.run import embed
from astropt_ds.model import AstroPT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def model():
    return AstroPT(load_config("21m", ["model.tokeniser=aim"]).model)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), np.uint8)


def test_the_gpu_is_taken_and_gives_bf16_near_fp32(model, images):
    exact = Embedder(model, device="cpu").embed(images)
    fast = Embedder(model)
    assert (fast.device.type, fast.precision) == ("cuda", "bf16")
    tolerance = 0.05 * np.abs(exact).max()
    np.testing.assert_allclose(fast.embed(images), exact, atol=tolerance)
    whole = Embedder(model, precision="fp32").embed(images)
    np.testing.assert_allclose(whole, exact, atol=1e-3)


def test_a_batch_that_does_not_fit_is_halved(model, images):
    expected = Embedder(model).embed(images)
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 2_000_000_000, dtype=torch.uint8, device="cuda")
    embedder = Embedder(model, batch=1 << 16)
    many = np.concatenate([images] * 64)
    found = embedder.embed(many)
    del hog
    assert embedder.batch(256) < len(many)
    tolerance = 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(found[-64:], expected, atol=tolerance)


@pytest.mark.parametrize("compile", [False, True])
def test_a_table_by_reading_processes_equals_the_notebooks(model, shards, tmp_path, compile):
    save_model(model, tmp_path / "model")
    options = {"workers": 4, "compile": compile}
    job = EmbedJob(str(tmp_path / "model"), (str(shards),), tmp_path / "table", **options)
    manifest = embed(job)
    assert manifest.rows == 150 and not manifest.failures
    cpu = EmbedJob(job.model, job.data, tmp_path / "cpu", device="cpu", workers=0)
    embed(cpu)
    tables = [read_embeddings(j.output, kind="numpy") for j in (job, cpu)]
    fast, exact = (np.stack(table["embedding"][np.argsort(table["id"])]) for table in tables)
    np.testing.assert_allclose(fast, exact, atol=0.05 * np.abs(exact).max())
