"""Fixtures: small synthetic surveys, the real one where it lies, and launched processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import psutil
import pytest
import simplejpeg
from hypothesis import HealthCheck, settings

from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards

# The machine's speed is no property of the code: neither deadlines nor complaints about slowness.
settings.register_profile("astropt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("astropt")

REPOSITORY = Path(__file__).parent.parent
# huggingface_hub reads both when it is imported, which deepspeed may do in any test.
HUB_HOME = tempfile.TemporaryDirectory(prefix="astropt-hub-")
os.environ |= {"HF_HOME": HUB_HOME.name, "HF_HUB_OFFLINE": "1"}
REQUIRED = os.environ.get("ASTROPT_REQUIRE", "").split(",")


def pytest_report_header():
    return f"galaxies: {find_galaxies() or 'simulated ones, since the real ones are not here'}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where ASTROPT_REQUIRE names what a test needs, a skip for its absence is a failure."""
    report = yield
    needs = item.get_closest_marker("needs")
    if report.skipped and needs and needs.args[0] in REQUIRED:
        report.outcome = "failed"
        report.longrepr = f"ASTROPT_REQUIRE={needs.args[0]}, but: {call.excinfo.value}"
    return report


def blob(seed: int, side: int = 64) -> np.ndarray:
    """A galaxy of sorts: a coloured Gaussian with noise, (side, side, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - side / 2
    q, size, angle = rng.uniform(0.3, 1), rng.uniform(0.08, 0.2) * side, rng.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    light = np.exp(-0.5 * ((u / size) ** 2 + (v / size / q) ** 2))[..., None]
    image = 20 + 200 * light * rng.uniform(0.4, 1, 3) + rng.normal(0, 6, (side, side, 3))
    return image.clip(0, 255).astype(np.uint8)


def write_images(folder: Path, count: int, side: int = 64, **columns) -> Path:
    """Blobs as JPEG files with a catalogue beside them; returns the catalogue's path."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        file = f"images/{i:05d}.jpg"
        (folder / file).write_bytes(simplejpeg.encode_jpeg(blob(i, side), quality=90))
        rows.append({"id": f"g{i:05d}", "file": file, "number": i})
    table = pd.DataFrame(rows).assign(**columns)
    table.to_csv(folder / "catalogue.csv", index=False)
    return folder / "catalogue.csv"


@pytest.fixture(scope="session")
def blob_shards(tmp_path_factory) -> Path:
    """Shards of 150 blobs of 64 pixels, several shards a split. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("survey")
    catalogue = write_images(folder, 150)
    job = Job(
        images=folder,
        catalogue=catalogue,
        output=folder / "shards",
        samples_per_shard=20,
        val_fraction=0.15,
        test_fraction=0.1,
    )
    make_shards(job)
    return folder / "shards"


@pytest.fixture(scope="session")
def shards(blob_shards) -> Path:
    """What tests train on unless their module says otherwise."""
    return blob_shards


@pytest.fixture(scope="session")
def real_shards(galaxies, blob_shards, tmp_path_factory) -> Path:
    """Shards of real galaxies where they lie, of blobs elsewhere. Not to be changed: copy it."""
    if galaxies is None:
        return blob_shards
    job = Job(
        images=galaxies,
        catalogue=galaxies / "manifest.csv",
        filter='subset == "legacy_512"',
        group_column="group",
        output=tmp_path_factory.mktemp("real") / "shards",
        samples_per_shard=40,
        val_fraction=0.15,
        test_fraction=0,
    )
    make_shards(job)
    return job.output


@pytest.fixture
def serve(shards, tmp_path):
    """Start web servers of a folder: ``serve(folder, fault)`` gives (url, process, log)."""
    processes = []

    def start(folder=shards, fault="none"):
        log = tmp_path / f"server-{len(processes)}.log"
        command = [sys.executable, REPOSITORY / "tests" / "server.py", folder, log, fault]
        processes.append(subprocess.Popen(command))
        while not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.02)
        return f"http://127.0.0.1:{log.read_text().split()[0]}", processes[-1], log

    yield start
    for process in processes:
        process.kill()


TINY = (
    "model.layers=2",
    "model.heads=2",
    "model.width=32",
    "data.image_size=64",
    "data.workers=0",
    "batch.global_images=12",
    "schedule.warmup=2",
    "precision=fp32",
    "eval.every=4",
    "checkpoint.every=3",
)


@pytest.fixture(scope="session")
def tiny(shards) -> tuple[str, ...]:
    """Overrides of the 1m preset that make a run of the small shards seconds long."""
    return (*TINY, f"data.path={shards}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def find_galaxies() -> Path | None:
    named = os.environ.get("ASTROPT_GALAXIES")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "galaxies"
    if named and not (folder / "manifest.csv").is_file():
        raise FileNotFoundError(f"ASTROPT_GALAXIES={named}: no manifest.csv there")
    return folder if (folder / "manifest.csv").is_file() else None


@pytest.fixture(scope="session")
def galaxies() -> Path | None:
    """The folder of real galaxies: ASTROPT_GALAXIES, or the one beside the repository, or none."""
    return find_galaxies()


@pytest.fixture(scope="session")
def hub_cache() -> Path:
    """Where huggingface_hub, kept off the network, looks for downloads: empty at first."""
    constants = pytest.importorskip("huggingface_hub.constants")
    assert HUB_HOME.name == constants.HF_HOME and constants.HF_HUB_OFFLINE
    return Path(HUB_HOME.name) / "hub"


@pytest.fixture(scope="session")
def transformers(hub_cache) -> ModuleType:
    """The library, whose import takes seconds."""
    return pytest.importorskip("transformers")


Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run a module or script on several ranks: ``launch(2, "-m", "astropt_ds.train", ...)``.

    ``meanwhile`` is called while it runs, for what happens to it from outside.
    """

    def run(
        ranks: int,
        *command: str,
        launcher: str = "torchrun",
        timeout: float = 300,
        meanwhile: Callable[[], None] = lambda: None,
        cwd: Path = REPOSITORY,
    ):
        port = str(free_port())
        prefix = {
            "torchrun": [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--nproc-per-node", str(ranks), "--master-port", port),
            ],
            "deepspeed": [
                *(sys.executable, "-m", "deepspeed.launcher.runner"),
                *("--num_gpus", str(ranks), "--master_port", port),
            ],
            "python": [sys.executable],
        }[launcher]
        arguments = [str(argument) for argument in command]
        if launcher == "deepspeed" and arguments[0] == "-m":
            arguments[0] = "--module"
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
        }
        with subprocess.Popen(
            [*prefix, *arguments],
            env=environment,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                meanwhile()
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                # a launcher that is killed leaves its ranks behind
                for started in (*psutil.Process(process.pid).children(recursive=True), process):
                    with suppress(psutil.NoSuchProcess):
                        started.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return run
