"""Small models and inputs of every kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from astropt_ds import save_model
from astropt_ds.config import DataConfig
from astropt_ds.config_source import load_config
from astropt_ds.data.decode import decode
from astropt_ds.data.open_shards import OpenShards, read_labels
from astropt_ds.data.remote import open_store
from astropt_ds.data.split import Split
from astropt_ds.embedding import plan, reader
from astropt_ds.embedding.job import EmbedJob
from astropt_ds.model import AstroPT


def tiny_model(tokeniser: str = "relu", channels: int = 3) -> AstroPT:
    """Two layers away from their symmetric start."""
    keys = [
        *("model.layers=2", "model.heads=2", "model.width=32", f"model.tokeniser={tokeniser}"),
        f"model.modalities.images.channels={channels}",
    ]
    model = AstroPT(load_config("1m", keys).model, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.fixture(scope="session")
def model() -> AstroPT:
    return tiny_model()


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, folder)
    return folder


@pytest.fixture
def many_parts(monkeypatch) -> None:
    """Parts of 16 galaxies, read five at a time: small surveys have several of both."""
    monkeypatch.setattr(plan, "LEAST_ROWS", 16)
    monkeypatch.setattr(reader, "CHUNK", 5)


@pytest.fixture
def job(model_folder, shards, tmp_path):
    """A job on the small shards; what is given is otherwise."""

    def make(**options) -> EmbedJob:
        given = {"model": str(model_folder), "data": (str(shards),), "output": tmp_path / "table"}
        return EmbedJob(**{**given, "workers": 0, **options})

    return make


@pytest.fixture(scope="session")
def expected(model, shards):
    """Each galaxy's embedding by its id, the plain way."""
    store, found, opened = open_store(str(shards), DataConfig()), {}, OpenShards(20)
    for name in ("train", "val", "test"):
        split = Split(store, name)
        for row in range(len(split)):
            descriptor = opened.descriptor(split, split.shard_of(row))
            image = decode(opened.image(split, row, descriptor))
            (labels,) = read_labels(descriptor, split, np.array([row]))
            states = model.hidden_states(model.tokens(image[None]), "last")
            found[labels["id"]] = (name, states.mean(dim=1)[0].detach().numpy())
    opened.close()
    return found


@pytest.fixture
def copied(shards, tmp_path):
    """Shards that may be damaged."""
    return shutil.copytree(shards, tmp_path / "copy")
