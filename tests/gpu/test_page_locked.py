"""Page-locked memory: what passes through it is what was there when it was asked for."""

from pathlib import Path

import torch

from astropt_ds.config_source import load_config
from astropt_ds.data.loader import Galaxies
from astropt_ds.training.fragments import Fragment
from astropt_ds.training.ranks import start
from astropt_ds.training.saver import Saver
from tests.gpu.runs import on_gpu

pytestmark = on_gpu


def test_a_copy_in_page_locked_memory_is_of_its_moment():
    """The writer reads it while the training goes on."""
    live = torch.full((50_000_000,), 1.0, device="cuda")
    seen = []

    def write(copies, ranks):
        seen.extend((copy.values.is_pinned(), copy.values.clone()) for copy in copies)
        return Path("anywhere")

    with start() as ranks:
        saver = Saver(ranks)
        fragment = Fragment("w", "weight", (len(live),), 0, live, True)
        saver.save(1, [fragment], {"checkpoint": write})
        live.fill_(2.0)
        saver.wait()
        saver.close()
    ((pinned, values),) = seen
    assert pinned and (values == 1.0).all()


def test_batches_in_page_locked_memory_reach_the_gpu_unchanged(tiny):
    """Slots are filled anew while copies are under way: none may be overwritten too early."""
    config = load_config("1m", [*tiny, "data.workers=2", "batch.micro=2"])
    plain, pinned = Galaxies(config), Galaxies(config)
    plain.open(0, 1)
    pinned.open(0, 1, pin=True)
    assert pinned.warnings == []
    device = torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    copies = []
    for batches in pinned.steps(0, 10):
        for batch in batches:
            assert batch.patches.is_pinned()
            busy = busy @ busy / 64  # copies wait behind it
            copies.append(batch.to(device)[0])
    expected = [batch.patches.clone() for step in plain.steps(0, 10) for batch in step]
    for found, patches in zip(copies, expected, strict=True):
        assert torch.equal(found.cpu(), patches)
