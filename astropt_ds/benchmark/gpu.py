"""What a step costs on one GPU, measured: stages, eager and compiled, images at once.

``python -m astropt_ds.benchmark.gpu RESULT DEADLINE CONFIG key=value...`` measures one case, in a
process of its own: what runs out of memory, or crashes, costs that case alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from astropt_ds.config import Config
from astropt_ds.config_source import load_config
from astropt_ds.data.batch import Batch
from astropt_ds.errors import run_cli
from astropt_ds.flops import parameters, utilisation
from astropt_ds.layers import INIT_STD, Init
from astropt_ds.memory import memory
from astropt_ds.model import AstroPT
from astropt_ds.plan import usable
from astropt_ds.training.environment import attention_kernel, versions
from astropt_ds.training.ranks import Ranks, start, uses_gpu
from astropt_ds.training.step_clock import split

STAGES = (1, 2, 3)  # bf16, which GPUs want, has none without partitions
MICROS = (48, 32, 16, 8, 4, 1)
IMAGES = 320  # of the paper's global batch
STEPS, WARMUP = 25, 5  # each case; so many micro-batches at the start are not counted
SWEEP = 0.7  # of the time; the rest is for the best case's split and global batch
MARGIN = 15.0  # seconds before a case's deadline, at which it makes no further step
MEASURED, OUT_OF_MEMORY = "measured", "out of memory"


def measure_gpu(config_name: str, scratch: Path, minutes: float = 9.0) -> dict[str, Any]:
    """Step times and memory of a model under one process, on random tokens that lie ready.

    On the GPU, or on the processor where there is none.

    Args:
        config_name: a preset's name or a YAML file.
        scratch: an empty folder.
        minutes: after which what is left is listed as not run.

    Returns:
        ``device``, ``versions``, ``parameters``, and three lists of cases, which say how they
        ended (``outcome``): ``cases``; ``profile``, the fastest at the configuration's own stage
        again with ``run.profile``; ``global_batch``, the same with as many micro-batches a step
        as make 320 images.

    Raises:
        UserError: no such preset or file.
    """
    clock = time.monotonic()
    config = load_config(config_name)
    device, size = _in_a_process_of_its_own(_device)
    sweep = cases(config_name, config, size)
    result: dict[str, Any] = {
        "device": device,
        "versions": versions(),
        "parameters": parameters(config.model),
        "cases": [],
        "profile": [],
        "global_batch": [],
    }

    def run(kind: str, case: list[str], share: float) -> None:
        deadline = clock + 60 * minutes * share
        result[kind].append(_run(config_name, case, scratch, deadline, size))
        print(_line(result[kind][-1]), flush=True)

    for case in sweep:
        run("cases", case, SWEEP)
    if (best := fastest(result["cases"], config.zero.stage)) is not None:
        run("profile", [*sweep[best], "run.profile=true"], 1.0)
        micro = result["cases"][best]["micro"]
        images = -(-IMAGES // micro) * micro
        run("global_batch", [*sweep[best], f"batch.global_images={images}"], 1.0)
    return result


def cases(config_name: str, config: Config, size: int | None) -> list[list[str]]:
    """Overrides of each case that fits, in the order in which they are worth their time.

    Args:
        config_name: as :func:`measure_gpu` takes it.
        config: what it says.
        size: bytes of the GPU; None for a processor, which takes all.
    """
    own = config.zero.stage
    stages = sorted(STAGES, key=lambda stage: (stage != own, stage))
    ways: list[list[list[str]]] = []
    for stage in stages:
        for compiled in ("true", "false"):
            common = [f"zero.stage={stage}", f"compile={compiled}"]
            of_each = [
                [*common, f"batch.micro={micro}", f"batch.global_images={micro}"]
                for micro in MICROS
            ]
            fitting = [case for case in of_each if _fits(load_config(config_name, case), size)]
            ways.append(fitting)
    # all ways at their largest batch, then all at the next
    longest = max(map(len, ways))
    return [way[place] for place in range(longest) for way in ways if place < len(way)]


def _fits(config: Config, size: int | None) -> bool:
    return size is None or _plan(config, size) <= usable(size)


def _plan(config: Config, size: int | None) -> int:
    micro, _ = config.batch.split(1)
    return memory(config, 1, micro, gpu=size is not None).peak


def fastest(found: list[dict[str, Any]], stage: int | None) -> int | None:
    """The place of the measured case with the most tokens a second at a stage; of all if None."""
    places = [
        place
        for place, case in enumerate(found)
        if case["outcome"] == MEASURED and stage in (None, case["stage"])
    ]
    return max(places, key=lambda place: found[place]["tokens_per_s"], default=None)


def _run(
    config_name: str, case: list[str], scratch: Path, deadline: float, size: int | None
) -> dict[str, Any]:
    """One case, measured elsewhere, and what became of it."""
    config = load_config(config_name, case)
    micro, accumulation = config.batch.split(1)
    found: dict[str, Any] = {
        "stage": config.zero.level,
        "compile": config.compile,
        "micro": micro,
        "accumulation": accumulation,
        "plan_bytes": _plan(config, size),
        "outcome": "not run: the time was over",
    }
    if (seconds := deadline - time.monotonic()) <= 0:
        return found
    path, log = scratch / "case.json", scratch / "case.log"
    path.unlink(missing_ok=True)
    command = ["-m", "astropt_ds.benchmark.gpu", str(path), str(deadline), config_name, *case]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu" if size is None else "cuda"}
    with log.open("w") as errors:
        done = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            done.wait(seconds)
        except subprocess.TimeoutExpired:
            done.kill()
            done.wait()
            return found | {"outcome": "not measured: the time was over before enough steps"}
    if path.exists():
        return found | {"outcome": MEASURED} | json.loads(path.read_text())
    said = log.read_text(errors="replace")
    if any(words in said for words in ("out of memory", "can't allocate memory")):
        return found | {"outcome": OUT_OF_MEMORY}
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "no word")
    return found | {"outcome": f"failed ({done.returncode}): {last.strip()[:200]}"}


def _line(case: dict[str, Any]) -> str:
    what = (
        f"ZeRO-{case['stage']} {'compiled' if case['compile'] else 'eager':8} "
        f"{case['micro']:3} x {case['accumulation']:3}"
    )
    if case["outcome"] != MEASURED:
        return f"{what}  {case['outcome']}"
    mfu = "" if case["mfu"] is None else f"  MFU {case['mfu']:.1%}"
    return (
        f"{what}  {case['step_s']:7.3f} s a step  {case['tokens_per_s']:9,.0f} tokens/s{mfu}  "
        f"{case['memory_bytes'] / 1e9:.1f} GB, planned {case['plan_bytes'] / 1e9:.1f}"
    )


def _device() -> tuple[str, int | None]:
    if not uses_gpu():
        return "cpu", None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory


def _in_a_process_of_its_own(function: Any) -> Any:
    """So that this process takes none of the GPU's memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function).result()


# What the process of a case does.


def main(argv: list[str]) -> None:
    """Measure one case, and write down what was found."""
    path, deadline, config_name, *case = argv
    config = load_config(config_name, case)
    with start() as ranks:
        found = _measure(config, ranks, float(deadline) - MARGIN)
    Path(path).write_text(json.dumps(found))


def _measure(config: Config, ranks: Ranks, deadline: float) -> dict[str, Any]:
    """Steps until all are made, or until the deadline (of time.monotonic) and two are counted."""
    # not above: the process that starts this one needs no DeepSpeed
    from astropt_ds.training.engine import Engine, partitioned

    Init.normal_ = _roughly  # type: ignore[assignment, method-assign]
    with partitioned(config, ranks), ranks.device:
        model = AstroPT(config.model, seed=config.seed, kernel=config.attention.kernel)
    engine = Engine(model, config, ranks)
    micro, accumulation = config.batch.split(1)
    batch = _batch(config, micro)
    warmup = -(-WARMUP // accumulation)
    times: list[float] = []
    parts: list[dict[str, float]] = []
    losses: list[float] = []
    clock = time.monotonic()
    while len(times) < STEPS and not (len(times) > warmup + 1 and time.monotonic() > deadline):
        result = engine.step([batch] * accumulation)
        # as a run's: a step ends when its loss is known, the optimizer's last kernels go on
        now = time.monotonic()
        times.append(now - clock)
        parts.append(split(result.seconds, times[-1], 0.0) if result.seconds else {})
        losses.append(result.loss)
        clock = now
    counted, parts = times[warmup:], parts[warmup:]
    step_s = median(counted)
    rate = config.batch.global_images * config.tokens_per_image / step_s
    return {
        "attention_kernel": attention_kernel(config, ranks),
        "steps": len(counted),
        "step_s": step_s,
        "step_s_quartiles": quantiles(counted, n=4, method="inclusive")[::2],
        "tokens_per_s": rate,
        **utilisation(config, rate, ranks.device_name, 1),
        "memory_bytes": ranks.peak_memory(),
        "losses": [losses[0], losses[-1]],
        "parts_s": {name: median(part[name] for part in parts) for name in parts[0]},
    }


def _batch(config: Config, micro: int) -> Batch:
    """Random patches, in page-locked memory where a GPU is to copy them, as the loader's."""
    shape = (micro, config.tokens_per_image, config.model.images.input_size)
    patches = torch.randint(256, shape, dtype=torch.uint8)
    patches = patches.pin_memory() if uses_gpu() else patches
    return Batch(patches, torch.ones(micro), torch.zeros(micro, dtype=torch.int64))


def _roughly(init: Init, parameter: Tensor) -> None:
    """Weights as random as a run's, on the device: a run's own take longer than all these steps."""
    with torch.no_grad():
        parameter.normal_(std=INIT_STD)


if __name__ == "__main__":
    run_cli(main)
