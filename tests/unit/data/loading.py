"""What the tests of the loader share: opened loaders, and copies of their batches."""

import torch

from astropt_ds.config_source import load_config
from astropt_ds.data.batch import Batch
from astropt_ds.data.decode import encode_fluxes
from astropt_ds.data.loader import Galaxies
from astropt_ds.data.manifest import FORMAT, Manifest
from astropt_ds.data.shards import Sample, write_index, write_shard


def galaxies(tiny, rank=0, ranks=1, **overrides):
    changes = [f"{k.replace('__', '.')}={v}" for k, v in overrides.items()]
    found = Galaxies(load_config("1m", [*tiny, *changes]))
    found.open(rank, ranks)
    return found


def kept(batches):
    """Copies of batches, whose memory is reused."""
    return [
        Batch(b.patches.clone(), b.weights.clone(), b.rows.clone(), b.faults, b.problem)
        for b in batches
    ]


def steps(loader, start, stop):
    """The micro-batches of each step, as copies."""
    return [kept(batches) for batches in loader.steps(start, stop)]


def global_batches(tiny, ranks, start, stop, **overrides):
    """The rows and patches of each global batch, gathered from all ranks and sorted."""
    gathered = [[] for _ in range(start, stop)]
    # all before any reads: as in a run, workers start while their process has no threads
    for loader in [galaxies(tiny, rank, ranks, **overrides) for rank in range(ranks)]:
        for i, batches in enumerate(steps(loader, start, stop)):
            gathered[i] += batches
        loader.close()
    merged = []
    for batches in gathered:
        rows = torch.cat([b.rows for b in batches])
        patches = torch.cat([b.patches for b in batches])
        order = torch.argsort(rows * 10**6 + patches.long().sum((1, 2)) % 10**6, stable=True)
        merged.append((rows[order], patches[order]))
    return merged


def write_fluxes(folder, channels, images, nan="none"):
    """Shards of these float images, all for training, the first two for validation too."""
    folder.mkdir()
    samples = [
        Sample(f"g{i}", "npy", encode_fluxes(image), {}, *image.shape[1::-1])
        for i, image in enumerate(images)
    ]
    splits = {
        name: write_index(folder, name, [write_shard(folder / f"{name}-000000.tar", part)])
        for name, part in (("train", samples), ("val", samples[:2]))
    }
    bands = list("griz")[:channels]
    Manifest(
        format=FORMAT, dtype="float32", channels=channels, bands=bands, nan=nan, splits=splits
    ).save(folder)
    return folder
