"""Fixtures: the cluster, started once, and what its users set."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY
from tests.slurm import cluster as slurm

NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


@pytest.fixture(scope="session")
def cluster():
    if why := slurm.missing():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="astropt-slurm-"))  # sockets want short paths
    found = slurm.Cluster(folder)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def submit(cluster, shards):
    """Submit a script: ``submit("train_2b.sh", run, "run.steps=60")`` returns the job's number."""

    def submit(script, run, *overrides, options=NODES, arguments=(), **more):
        settings = {
            "ASTROPT_VENV": str(Path(sys.executable).parent.parent),
            "ASTROPT_ACCELERATOR": "cpu",
            "ASTROPT_DATA": str(shards),
            "ASTROPT_RUN": str(run),
            "ASTROPT_OVERRIDES": " ".join((*TINY, *overrides)),
        }
        log = f"--output={run}-%A.log" if "--array" in " ".join(options) else f"--output={run}.log"
        path = REPOSITORY / "slurm" / script
        return cluster.submit(*options, log, path, *arguments, **{**settings, **more})

    return submit
