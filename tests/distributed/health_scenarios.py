"""What one launch computes for test_health.py: bad updates at every stage, and what came of them.

Run by torchrun: ``health_scenarios.py FOLDER``; writes health.json there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist

from astropt_ds.errors import run_cli
from astropt_ds.training.engine import Engine
from astropt_ds.training.ranks import Ranks, start
from tests.distributed.scenarios import GLOBAL_IMAGES, build, configuration, share

BEFORE, AFTER = 6, 4  # good steps before each fault, and after the last one
ARRANGEMENTS = [
    *((stage, "fp32") for stage in ("0", "1", "2", "3", "3-offload")),
    *((stage, "bf16") for stage in ("1", "2", "3")),
]
FAULTS = ("nan loss", "infinite gradient", "overflowing norm", "loss spike", "gradient spike")
GRADIENTS = {
    "infinite gradient": lambda gradient: gradient + float("inf"),
    "overflowing norm": lambda gradient: torch.full_like(gradient, 1e30),  # finite, its square not
    "gradient spike": lambda gradient: gradient + 1e3,
}


def state_hash(engine: Engine, ranks: Ranks) -> str:
    """Of all weights and moments, on all ranks, and of the weights that the forward pass sees."""
    digest = hashlib.sha256()
    for fragment in engine.fragments():
        digest.update(fragment.values.cpu().numpy().tobytes())
    for parameter in engine.engine.module.parameters():
        seen = getattr(parameter, "ds_tensor", parameter)
        digest.update(seen.detach().float().cpu().numpy().tobytes())
    return "".join(ranks.gather(digest.hexdigest()))


def bad_step(engine: Engine, ranks: Ranks, micro: int, step: int, fault: str):
    """A step that is spoilt on the last rank."""
    batches = share(step, ranks, micro)
    hook = None
    if ranks.rank == ranks.size - 1:
        if fault == "nan loss":
            batches[0].weights[0] = float("nan")
        elif fault == "loss spike":
            head = engine.engine.module.decoders["images"]
            hook = head.register_forward_hook(lambda module, inputs, output: output + 100.0)
        else:
            weight = engine.engine.module.decoders["images"][4].weight
            hook = weight.register_hook(GRADIENTS[fault])
    try:
        return engine.step(batches)
    finally:
        if hook:
            hook.remove()


def skipping(ranks: Ranks, stage: str, precision: str) -> dict:
    """Each fault between good steps, and the same good steps without any fault."""
    micro = GLOBAL_IMAGES // ranks.size
    config = configuration(stage, micro, precision)
    rules = config.health.model_copy(update={"window": 8, "sigma": 20.0})
    config = config.model_copy(update={"health": rules})
    engine, undisturbed = build(config, ranks), build(config, ranks)
    found: dict = {"faults": {}, "losses": [], "undisturbed": []}
    for step in range(BEFORE):
        found["losses"].append(engine.step(share(step, ranks, micro)).loss)
    for fault in FAULTS:
        before = state_hash(engine, ranks)
        result = bad_step(engine, ranks, micro, BEFORE, fault)
        found["faults"][fault] = {
            "skipped": result.skipped,
            "in_a_row": result.in_a_row,
            "moved": state_hash(engine, ranks) != before,
            "updates": [result.updates, engine.updates],
        }
    for step in range(BEFORE, BEFORE + AFTER):
        found["losses"].append(engine.step(share(step, ranks, micro)).loss)
    for step in range(BEFORE + AFTER):
        found["undisturbed"].append(undisturbed.step(share(step, ranks, micro)).loss)
    return found


def first_step(ranks: Ranks, stage: str) -> dict:
    """A fault at the very first step, when AdamW has no state yet; good steps follow."""
    micro = GLOBAL_IMAGES // ranks.size
    engine = build(configuration(stage, micro), ranks)
    skipped = bad_step(engine, ranks, micro, 0, "infinite gradient").skipped
    losses = [engine.step(share(step, ranks, micro)).loss for step in range(3)]
    return {"skipped": skipped, "losses": losses}


def main(argv: list[str]) -> None:
    folder = Path(argv[0])
    with start() as ranks:
        out = {
            "skip": {f"{s}-{p}": skipping(ranks, s, p) for s, p in ARRANGEMENTS},
            "first": {stage: first_step(ranks, stage) for stage in ("0", "1", "2", "3")},
        }
        if ranks.main:
            (folder / "health.json").write_text(json.dumps(out))
        dist.barrier()


if __name__ == "__main__":
    run_cli(main)  # its end spares us that of C++ threads
