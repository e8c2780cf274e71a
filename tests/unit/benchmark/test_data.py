import importlib.util
import json

import numpy as np
import psutil
import pytest
import simplejpeg
import torch

from astropt_ds.benchmark.measure import in_turns, ratio
from astropt_ds.benchmark.reference import reference_dataset
from astropt_ds.tokens import grid, standardise
from tests.conftest import blob

upstream = pytest.mark.needs("parity")


def require_upstream():
    if importlib.util.find_spec("astropt") is None:
        pytest.skip("astropt 2.0.9 is not installed")


def test_works_take_turns_and_a_first_round_is_not_counted():
    order = []

    def work(name, loops):
        def run():
            order.append(name)
            sum(i * i for i in range(loops))
            return 10

        return run

    found = in_turns({"a": work("a", 200_000), "b": work("b", 2_000_000)}, 3, {})
    assert order == ["a", "b"] * 4
    assert len(found["a"]) == len(found["b"]) == 3
    assert ratio({"a": [1.0, 8.0, 3.0], "b": [2.0, 2.0, 2.0]}, "a", "b") == 1.5


def test_the_cpu_of_processes_that_still_run_is_counted():
    """As the loader's: they live on from round to round."""
    import multiprocessing

    from astropt_ds.benchmark.measure import cpu_seconds

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def burn():
        there.recv()
        total = 0
        for i in range(3_000_000):
            total += i
        there.send(total)
        there.recv()

    child = context.Process(target=burn, daemon=True)
    child.start()
    running = [psutil.Process(child.pid)]
    before, blind = cpu_seconds(running), cpu_seconds()
    here.send(0)
    here.recv()
    assert cpu_seconds(running) - before > cpu_seconds() - blind + 0.02
    child.kill()


@upstream
def test_the_reference_sees_the_same_tokens_to_its_own_precision(tmp_path):
    """Else the two would not be doing the same work. The reference goes through bf16 and fp16."""
    require_upstream()
    image = blob(0, 128)
    file = tmp_path / "a.jpg"
    file.write_bytes(simplejpeg.encode_jpeg(image, quality=95))
    pixels = simplejpeg.decode_jpeg(file.read_bytes())
    found = reference_dataset([file, file], tmp_path)[0]["images"].float()
    # without the transposition that the package's caller makes
    patches = torch.from_numpy(grid(128, 16, "rows").to_patches(pixels))
    expected = standardise(patches)
    assert found.shape == expected.shape
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(found, expected, strict=True)]
    assert min(correlations) > 0.99


@upstream
def test_the_command_measures_all_that_it_names(launch, tmp_path):
    require_upstream()
    out = tmp_path / "data.json"
    command = ("tools/benchmark.py", "data", "--count", "40", "--rounds", "1")
    done = launch(1, *command, "--against", "astropt", "--json", out, launcher="python")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    stamps = result["synthetic, quality 90"]
    assert stamps["images"] == 40
    names = {"bare simplejpeg", "loader, no worker", "loader, 2 workers", "make_shards"}
    assert set(stamps["cpu_ms_an_image"]) == names | {
        *("verify_shards", "astropt 2.0.9, no worker", "astropt 2.0.9, 2 workers"),
    }
    assert all(value > 0 for value in stamps["cpu_ms_an_image"].values())
    assert stamps["reference_over_loader"] > 1 and stamps["worker_memory_mb"] > 1
    assert result["startup"]["samples"] == 10_000_000 and result["startup"]["added_memory_mb"] < 250


@pytest.mark.parametrize(
    "options, message",
    [
        (("--images", "nowhere"), "--images nowhere: is no folder"),
        (("--count", "3"), "--count 3: 32 or more would be right"),
        (("--rounds", "0"), "--rounds 0: 1 or more would be right"),
    ],
)
def test_bad_options_are_one_line(launch, options, message):
    done = launch(1, "tools/benchmark.py", "data", *options, launcher="python")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"error: {message}"
