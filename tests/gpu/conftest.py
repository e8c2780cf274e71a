"""Stamps of the size that the large models are trained on."""

from pathlib import Path

import pytest

from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from tests.conftest import write_images


@pytest.fixture(scope="session")
def stamps(tmp_path_factory) -> Path:
    """Shards of 320 blobs of 512 pixels, 1024 tokens each. Not to be changed."""
    folder = tmp_path_factory.mktemp("stamps")
    catalogue = write_images(folder, 320, side=512)
    job = Job(
        images=folder,
        catalogue=catalogue,
        output=folder / "shards",
        samples_per_shard=40,
        val_fraction=0.1,
        test_fraction=0,
    )
    make_shards(job)
    return folder / "shards"
