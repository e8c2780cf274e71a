"""On an NVIDIA GPU: bf16, and the 2.1B model in training. Run: pytest -m gpu tests/gpu"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import astropt_ds
from astropt_ds.config_source import load_config
from astropt_ds.data.loader import Galaxies
from astropt_ds.model import AstroPT
from astropt_ds.training.fragments import Fragment
from astropt_ds.training.metrics import read_metrics
from astropt_ds.training.ranks import start
from astropt_ds.training.saver import Saver
from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def test_a_model_loaded_to_the_gpu_reads_images_as_on_the_cpu(tmp_path):
    astropt_ds.save_model(AstroPT(load_config("5m").model), tmp_path / "model")
    images = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    ours, theirs = (astropt_ds.load_model(tmp_path / "model", device=d) for d in ("cpu", "cuda"))
    tokens = theirs.tokens(images)
    torch.testing.assert_close(tokens.cpu(), ours.tokens(images), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tokens)[0].cpu(), ours(tokens.cpu())[0], atol=1e-3, rtol=1e-3
        )
    astropt_ds.save_model(theirs, tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("tokeniser", ["relu", "aim", "affine"])
def test_the_bf16_loss_follows_fp32(tokeniser):
    config = load_config("21m", [f"model.tokeniser={tokeniser}"]).model
    model = AstroPT(config).cuda()
    x = torch.randn(4, 1024, 768, device="cuda")
    _, expected = model(x[:, :-1], x[:, 1:])
    _, found = model.bfloat16()(x[:, :-1], x[:, 1:])
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)


def command_line(shards, run, *overrides):
    command = [
        *(sys.executable, "-m", "astropt_ds.train", f"data.path={shards}", f"run.dir={run}"),
        *overrides,
    ]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=540)


@pytest.mark.parametrize(
    "keys",
    [
        ("zero.stage=0", "precision=fp32"),
        ("zero.stage=1", "precision=bf16"),
        ("zero.stage=2", "precision=bf16"),
        ("zero.stage=3", "precision=bf16"),
        ("zero.stage=3", "precision=bf16", "zero.offload=true"),
    ],
)
def test_a_resumed_run_is_bit_identical(tiny, shards, tmp_path, keys):
    common = [*tiny, *keys, "--config", "1m"]
    whole = command_line(shards, tmp_path / "whole", *common, "run.steps=6")
    assert whole.returncode == 0, whole.stderr[-3000:]
    for steps in (3, 6):
        part = command_line(shards, tmp_path / "part", *common, f"run.steps={steps}")
        assert part.returncode == 0, part.stderr[-3000:]
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name) if r["kind"] == "train"]
        for name in ("whole", "part")
    ]
    assert len(losses[0]) == 6 and losses[0] == losses[1]


def test_a_bad_update_is_skipped_and_moves_nothing(tmp_path):
    script = REPOSITORY / "tests" / "distributed" / "health_scenarios.py"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, script, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "health.json").read_text())["skip"]
    assert {"0-fp32", "1-bf16", "2-bf16", "3-bf16", "3-offload-fp32"} <= results.keys()
    for name, found in results.items():
        for fault, outcome in found["faults"].items():
            assert outcome["skipped"] and not outcome["moved"], (name, fault)
        assert found["losses"] == found["undisturbed"], name


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


def test_the_2100m_model_trains_under_zero_3(shards, tmp_path):
    """30 steps of the largest preset; 16 tokens an image keep the small shards usable."""
    done = command_line(
        *(shards, tmp_path, "--config", "2100m", "data.image_size=64", "batch.global_images=64"),
        *("batch.micro=32", "run.steps=30", "schedule.warmup=5", "checkpoint.every=1000000"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [r["loss"] for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


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
