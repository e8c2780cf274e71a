"""A plan as people and programs read it: every stage beside the others, and the paper's ladder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from astropt_ds.config import Config
from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.gpus import Gpu
from astropt_ds.memory import host_bytes
from astropt_ds.plan import (
    GB,
    Choice,
    best,
    checkpoint_bytes,
    communication,
    communication_s,
    course,
    propose,
    with_zero,
)

WAYS: dict[str, dict[str, Any]] = {
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3 + hpz": {"stage": 3, "hpz": True},
    "3 + offload": {"stage": 3, "offload": True},
}
SWEEP = ("1m", "5m", "12m", "21m", "89m", "309m", "830m", "2100m")  # the paper's sizes


def plan(
    config: Config, gpus: int, gpu: Gpu, utilisation: float, price: float | None, per_node: int
) -> dict[str, Any]:
    """Everything about a run on so many GPUs.

    Args:
        config: of the run.
        gpus: how many.
        gpu: their kind.
        utilisation: the share of their peak that they reach.
        price: of a GPU hour, if costs are wanted.
        per_node: GPUs of a node.

    Returns:
        ``ways``: each stage's memory, largest micro-batch and traffic; ``proposal``: what
        ``auto`` would take, or why nothing fits; ``run``, ``checkpoint``, ``sweep``.

    Raises:
        UserError: the global batch cannot be split over the GPUs.
    """
    per_node = min(per_node, gpus)
    ways = {}
    for name, keys in WAYS.items():
        way = with_zero(config, **{"offload": False, "hpz": False, **keys})
        choice = best(way, gpus, gpu.memory, per_node)
        ways[name] = _way(choice, gpus, gpu, per_node)
    try:
        asked = propose(config, gpus, gpu.memory, per_node)
        chosen: Choice | None = asked if asked.fits else None
        problem = None if asked.fits else "what is asked for does not fit"
    except UserError as error:
        chosen, problem = None, str(error)
    proposal: dict[str, Any] = {"problem": problem}
    if chosen:
        zero = chosen.config.zero
        proposal = {
            "zero.stage": zero.level,
            "zero.offload": zero.offload,
            "zero.hpz": zero.hpz,
            "batch.micro": chosen.micro,
            "accumulation": chosen.accumulation,
            **_way(chosen, gpus, gpu, per_node),
        }
    return {
        "ways": ways,
        "proposal": proposal,
        "run": course(config, gpus, gpu, utilisation, price)._asdict(),
        "checkpoint": checkpoint_bytes(config),
        "sweep": sweep(config, gpu, utilisation, price),
    }


def _way(choice: Choice, gpus: int, gpu: Gpu, per_node: int) -> dict[str, Any]:
    sent = communication(choice, gpus, per_node)
    return {
        "memory": {**choice.memory._asdict(), "state": choice.memory.state},
        "peak": choice.memory.peak,
        "host": host_bytes(choice.config, gpus),
        "fits": choice.fits,
        "micro": choice.micro,
        "accumulation": choice.accumulation,
        "sent": sent,
        "sent_s": communication_s(sent, gpu, gpus, per_node),
    }


def sweep(
    config: Config, gpu: Gpu, utilisation: float, price: float | None
) -> dict[str, dict[str, Any]]:
    """The paper's eight sizes, each for this run's images and steps, one GPU's worth of each."""
    found = {}
    for name in SWEEP:
        size = load_config(name)
        same = {key: getattr(config, key) for key in ("data", "batch", "run", "precision")}
        same_run = size.model_copy(update={**same, "recompute": config.recompute})
        found[name] = course(same_run, 1, gpu, utilisation, price)._asdict()
    totals = {key: sum(run[key] or 0 for run in found.values()) for key in found[SWEEP[0]]}
    return {**found, "all": {**totals, "cost": None if price is None else totals["cost"]}}


def lines(found: dict[str, Any], gpus: int, gpu: Gpu) -> Iterator[str]:
    """The same as text."""
    heading = ("state", "activations", "peak", "fits", "micro", "x", "sent a step")
    yield f"{'on each GPU, GB':17}" + "".join(f"{word:>12}" for word in heading)
    for name, way in found["ways"].items():
        words = (
            *(f"{way['memory'][key] / GB:.2f}" for key in ("state", "activations")),
            *(f"{way['peak'] / GB:.2f}", "yes" if way["fits"] else "no"),
            *(str(way["micro"]), str(way["accumulation"])),
            f"{sum(way['sent'].values()) / GB:.2f}",
        )
        yield f"  ZeRO-{name:11}" + "".join(f"{word:>12}" for word in words)
    run, proposal = found["run"], found["proposal"]
    if proposal.get("problem"):
        yield f"proposal: none, {proposal['problem']}"
    else:
        extras = [key for key in ("zero.offload", "zero.hpz") if proposal[key]]
        more = "".join(f" {key}=true" for key in extras)
        yield (
            f"proposal: zero.stage={proposal['zero.stage']}{more} "
            f"batch.micro={proposal['batch.micro']}, accumulation {proposal['accumulation']}"
        )
        yield (
            f"a step: {run['step_s']:.3g} s of computation; communication would be "
            f"{proposal['sent_s']:.3g} s if nothing hid it (links of {gpu.link / GB:.0f} GB/s in a "
            f"node, {gpu.net / GB:.0f} GB/s a GPU to others)"
        )
    yield f"the run: {run['hours']:,.3g} hours on {gpus} x {gpu.name}, {_work(run)}"
    sizes = found["checkpoint"]
    yield (
        f"a checkpoint: {sizes['checkpoint'] / GB:,.3g} GB; "
        f"a model folder in fp32: {sizes['model'] / GB:,.3g} GB"
    )
    yield "the paper's sizes for as many images, of which the small ones reach less of the peak:"
    for name, size in found["sweep"].items():
        yield f"  {name:8} {_work(size)}"


def _work(course: dict[str, Any]) -> str:
    cost = "" if course["cost"] is None else f", cost {course['cost']:,.2f}"
    return f"{course['gpu_hours']:,.4g} GPU hours, {course['kwh']:,.4g} kWh{cost}"
