import shutil
from pathlib import Path

import pytest

from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from tests.conftest import write_images


@pytest.fixture(scope="session")
def second(tmp_path_factory) -> Path:
    """Another survey, of 40 images."""
    folder = tmp_path_factory.mktemp("second")
    catalogue = write_images(folder, 40)
    job = Job(
        images=folder,
        catalogue=catalogue,
        output=folder / "shards",
        samples_per_shard=9,
        val_fraction=0.3,
        test_fraction=0,
    )
    make_shards(job)
    return job.output


@pytest.fixture
def data(shards, tmp_path):
    """A copy of the shards, to be damaged."""
    shutil.copytree(shards, tmp_path / "data")
    return tmp_path / "data"
