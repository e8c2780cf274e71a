"""The parts of a step and the trace on an NVIDIA GPU. Run: pytest -m gpu tests/gpu"""

import gzip
import json
import time
from types import SimpleNamespace

import pytest
import torch

from astropt_ds.training.metrics import read_metrics
from astropt_ds.training.step_clock import COLLECTIVES, StepClock
from tests.gpu.runs import command_line

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
PARTS = ("data_s", "forward_s", "backward_s", "optimizer_s", "communication_s", "other_s")


def test_kernels_count_where_they_were_launched():
    clock = StepClock(torch.device("cuda"), SimpleNamespace(**dict.fromkeys(COLLECTIVES)))
    matrix = torch.randn(8192, 8192, device="cuda")
    matrix @ matrix
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with clock("forward"):
        start = time.monotonic()
        begin.record()
        for _ in range(20):
            matrix @ matrix
        end.record()
        launched = time.monotonic() - start
    with clock("backward"):
        pass
    seconds = clock.take()
    assert seconds["forward"] >= begin.elapsed_time(end) / 1000 > 5 * launched
    assert seconds["backward"] < 0.1 * seconds["forward"]


def test_a_profiled_run_is_bit_identical_and_its_parts_add_up(tiny, shards, tmp_path):
    common = (*tiny, "--config", "1m", "run.steps=4", "zero.stage=3", "precision=bf16")
    for name, keys in (("plain", ()), ("profiled", ("run.profile=true", "run.trace=[3,4]"))):
        done = command_line(shards, tmp_path / name, *common, *keys)
        assert done.returncode == 0, done.stderr[-3000:]
    plain, found = (
        [r for r in read_metrics(tmp_path / name) if r["kind"] == "train"]
        for name in ("plain", "profiled")
    )
    assert [r["loss"] for r in found] == [r["loss"] for r in plain]
    for r in found:
        seconds = r["tokens"] / r["step"] / r["tokens_per_s"]
        assert sum(r[part] for part in PARTS) == pytest.approx(seconds)
        assert all(r[part] >= 0 for part in PARTS)
        assert min(r["forward_s"], r["backward_s"], r["optimizer_s"]) > 0
    (file,) = (tmp_path / "profiled" / "trace").iterdir()
    assert file.name == "step-00000003-rank-00000.json.gz"
    with gzip.open(file) as text:
        kinds = {event.get("cat") for event in json.load(text)["traceEvents"]}
    assert {"kernel", "cpu_op"} <= kinds
