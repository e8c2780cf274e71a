"""The way of the data, measured: into shards, verified, and to uint8 tokens ready for a device."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import simplejpeg
from torch.utils.data import DataLoader

from astropt_ds.benchmark.measure import Work, in_turns, ratio
from astropt_ds.benchmark.reference import reference_dataset
from astropt_ds.config import Config
from astropt_ds.config_source import load_config
from astropt_ds.data.loader import Galaxies
from astropt_ds.data.verify import verify
from astropt_ds.errors import UserError
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards

SIDE = 512  # pixels of the stamps measured
MICRO = 16
BARE, NONE, TWO = "bare simplejpeg", "loader, no worker", "loader, 2 workers"
MAKE, VERIFY = "make_shards", "verify_shards"
REFERENCE, REFERENCE_TWO = "astropt 2.0.9, no worker", "astropt 2.0.9, 2 workers"


@dataclass(frozen=True)
class Stamps:
    """JPEG files of one size to measure with."""

    name: str
    files: list[Path]

    def copy_to(self, folder: Path) -> list[Path]:
        """Copies in a new folder, named by number."""
        folder.mkdir()
        names = [folder / f"{number:06d}.jpg" for number in range(len(self.files))]
        for file, name in zip(self.files, names, strict=True):
            shutil.copy(file, name)
        return names


def measure_data(stamps: Stamps, rounds: int, against: bool, scratch: Path) -> dict[str, Any]:
    """CPU milliseconds an image of every part, and the ratios that are claimed.

    Args:
        stamps: the images; they are read from the page cache.
        rounds: in which all parts take turns.
        against: measure AstroPT's own image path, too.
        scratch: an empty folder.
    """
    images = scratch / "images"
    files = stamps.copy_to(images)
    job = Job(images=images, output=scratch / "shards", val_fraction=0.1, test_fraction=0)
    make_shards(job, say=_quiet)
    with _loader(scratch, 0) as none, _loader(scratch, 2) as some:
        works = {
            BARE: _decode([file.read_bytes() for file in files]),
            NONE: _epoch(none),
            TWO: _epoch(some),
            MAKE: _make(images, scratch),
            VERIFY: lambda: verify(scratch / "shards").samples,
        }
        workers = psutil.Process().children()
        running = {TWO: workers}
        if against:
            # as its training script loads: by torch's DataLoader, into batches
            dataset = reference_dataset(files, scratch)
            works[REFERENCE] = _batches(DataLoader(dataset, MICRO))
            two = DataLoader(dataset, MICRO, num_workers=2, persistent_workers=True)
            works[REFERENCE_TWO] = _batches(two)
            works[REFERENCE_TWO]()  # starts its processes
            running[REFERENCE_TWO] = [p for p in psutil.Process().children() if p not in workers]
        found = in_turns(works, rounds, running)
        memory = [process.memory_full_info().uss for process in workers]
    result: dict[str, Any] = {
        "images": len(files),
        "bytes_an_image": round(sum(file.stat().st_size for file in files) / len(files)),
        "cpu_ms_an_image": {name: 1e3 * median(times) for name, times in found.items()},
        "images_a_cpu_second": {name: 1 / median(times) for name, times in found.items()},
        "loader_over_bare_decode": ratio(found, NONE, BARE),
        "two_workers_over_bare_decode": ratio(found, TWO, BARE),
        "worker_memory_mb": max(memory) / 1e6,
    }
    if against:
        result["reference_over_loader"] = ratio(found, REFERENCE, NONE)
        result["reference_over_loader_with_two_workers"] = ratio(found, REFERENCE_TWO, TWO)
    return result


def real_stamps(folder: Path) -> Stamps:
    """The 512-pixel JPEG stamps below a folder.

    Raises:
        UserError: there are fewer than two batches.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: is no folder")
    files = [path for path in sorted(folder.rglob("*.jp*g")) if _is_stamp(path.read_bytes())]
    if len(files) < 2 * MICRO:
        raise UserError(f"--images {folder}: {len(files)} JPEG images of {SIDE} pixels; too few")
    return Stamps(folder.name, files)


def synthetic_stamps(count: int, folder: Path) -> Stamps:
    """Discs on a noisy sky, 512 pixels, JPEG quality 90 with halved colour, some 50 kB each.

    Raises:
        UserError: fewer than two batches.
    """
    if count < 2 * MICRO:
        raise UserError(f"--count {count}: {2 * MICRO} or more would be right")
    files = [folder / f"synthetic-{number}.jpg" for number in range(count)]
    for number, file in enumerate(files):
        file.write_bytes(simplejpeg.encode_jpeg(_disc(number), quality=90, colorsubsampling="420"))
    return Stamps("synthetic, quality 90", files)


def _disc(seed: int) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: an exponential disc, noise of 6 grey levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    ratio, scale = rng.uniform(0.3, 1), rng.uniform(0.04, 0.12) * SIDE
    light = np.exp(-np.hypot(x, y / ratio) / scale)[..., None] * rng.uniform(0.4, 1, 3)
    return (20 + 200 * light + rng.normal(0, 6, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)


def _quiet(line: str) -> None:
    """What ingest would tell a user."""


def _is_stamp(data: bytes) -> bool:
    try:
        return simplejpeg.decode_jpeg_header(data)[:3] == (SIDE, SIDE, "YCbCr")
    except ValueError:
        return False


def _config(shards: Path, workers: int) -> Config:
    overrides = (f"data.path={shards}", f"data.workers={workers}", f"data.image_size={SIDE}")
    return load_config("1m", [*overrides, f"batch.global_images={MICRO}", f"batch.micro={MICRO}"])


@contextmanager
def _loader(scratch: Path, workers: int) -> Iterator[Galaxies]:
    galaxies = Galaxies(_config(scratch / "shards", workers))
    galaxies.open(0, 1)
    try:
        yield galaxies
    finally:
        galaxies.close()


def _epoch(galaxies: Galaxies) -> Work:
    """Read an epoch, each one where the last ended."""
    step = 0

    def work() -> int:
        nonlocal step
        count = 0
        for batches in galaxies.steps(step, step + galaxies.steps_an_epoch):
            for batch in batches:
                assert batch.problem is None and not batch.faults
                count += len(batch.rows)
        step += galaxies.steps_an_epoch
        return count

    return work


def _decode(blobs: list[bytes]) -> Work:
    def work() -> int:
        for blob in blobs:
            simplejpeg.decode_jpeg(blob, colorspace="RGB")
        return len(blobs)

    return work


def _batches(loader: DataLoader) -> Work:
    return lambda: sum(len(batch["images"]) for batch in loader)


def _make(images: Path, scratch: Path) -> Work:
    def work() -> int:
        output = scratch / "again"
        report = make_shards(Job(images=images, output=output), say=_quiet)
        shutil.rmtree(output)
        return sum(report.samples.values())

    return work
