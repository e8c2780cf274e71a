"""A training step, measured: this package's engine beside a plain loop and AstroPT's own."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from astropt_ds.benchmark.launch import launch
from astropt_ds.benchmark.measure import ratio, spread
from astropt_ds.config import Config
from astropt_ds.config_source import load_config
from astropt_ds.flops import training_flops

PLAIN, REFERENCE = "plain loop", "astropt 2.0.9"
PRODUCTS = "the largest product"
ENGINES = {
    "ZeRO-1": ("zero.stage=1", "precision=fp32"),
    "ZeRO-3": ("zero.stage=3", "precision=fp32"),
    "ZeRO-1, bf16": ("zero.stage=1", "precision=bf16"),
    "ZeRO-1, compiled": ("zero.stage=1", "precision=fp32", "compile=true"),
}
WANTED, FOUND = "wanted.json", "found.json"  # of the measuring process


def measure_training(
    source: str, images: int, rounds: int, against: bool, scratch: Path
) -> dict[str, Any]:
    """CPU seconds of a step, tokens a CPU second, and the ratios that are claimed.

    Args:
        source: a preset's name or a YAML file, of AstroPT's second generation.
        images: of 1024 tokens (or as the configuration has them) in a step.
        rounds: in which all take turns.
        against: measure AstroPT's own step, too.
        scratch: an empty folder.

    Raises:
        UserError: no such preset, AstroPT is not installed, or their losses differ.
    """
    config = step_config(source, images, ENGINES["ZeRO-1"])
    wanted = {"source": source, "images": images, "rounds": rounds, "against": against}
    (scratch / WANTED).write_text(json.dumps(wanted))
    launch(1, "astropt_ds.benchmark.steps", str(scratch))
    found: dict[str, list[float]] = json.loads((scratch / FOUND).read_text())
    tokens = images * config.tokens_per_image
    gigaflop = training_flops(config.model, config.tokens_per_image) * images / 1e9
    timed = {name: times for name, times in found.items() if name != PRODUCTS}
    result: dict[str, Any] = {
        "tokens_a_step": tokens,
        "cpu_s_a_step": {name: median(times) for name, times in timed.items()},
        "spread": {name: spread(times) for name, times in timed.items()},
        "tokens_a_cpu_second": {name: tokens / median(times) for name, times in timed.items()},
        "images_a_cpu_second": {name: images / median(times) for name, times in timed.items()},
        "share_of_the_largest_products_speed": {
            name: gigaflop * ratio(found, PRODUCTS, name) for name in timed
        },
        "over_the_plain_loop": {name: ratio(found, name, PLAIN) for name in ENGINES},
        "fp32_over_bf16": ratio(found, "ZeRO-1", "ZeRO-1, bf16"),
    }
    if against:
        fp32 = [name for name in ENGINES if "bf16" not in name]
        result["reference_over_ours"] = {name: ratio(found, REFERENCE, name) for name in fp32}
    return result


def step_config(source: str, images: int, keys: tuple[str, ...]) -> Config:
    """A configuration whose steps all do the same work: one micro-batch, a constant rate.

    Raises:
        UserError: no such preset or file.
    """
    same = ("schedule.kind=constant", "schedule.warmup=0", "health.spike=ignore", "optim.lr=1e-4")
    sizes = (f"batch.global_images={images}", f"batch.micro={images}")
    return load_config(source, ["model.tokeniser=aim", *same, *sizes, *keys])
