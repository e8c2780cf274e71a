"""What one launch computes for test_compute.py; writes a JSON of results.

Run by torchrun: ``compute_scenarios.py FOLDER matrix`` (each way to run the blocks at each stage),
``few`` (at stage 3) or ``traffic`` (what travels, and hierarchical partitions).
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from astropt_ds import plan as plan_module
from astropt_ds.config import Config, ZeroConfig
from astropt_ds.errors import run_cli
from astropt_ds.plan import Choice, communication
from astropt_ds.training import checkpoint
from astropt_ds.training import engine as engine_module
from astropt_ds.training.engine import Engine
from astropt_ds.training.ranks import Ranks, start
from astropt_ds.training.step_clock import COLLECTIVES
from astropt_ds.zero import zero_settings
from tests.distributed import scenarios
from tests.distributed.scenarios import GLOBAL_IMAGES, share

STEPS = 4
WAYS = {  # precision and stage
    "few": (("fp32", "3"),),
    "matrix": (*(("fp32", s) for s in ("0", "1", "2", "3")), ("bf16", "1"), ("bf16", "3")),
}
RECOMPUTE = ("none", "selective", "full")
FORGOTTEN = (("3-forgetful", 1), ("3-hpz-forgetful", 1))  # last: it changes the settings
TRAFFIC = ("1", "2", "3", "3-hpz")
FORGETFUL = {"stage3_max_reuse_distance": 5_000_000, "stage3_prefetch_bucket_size": 100_000}


def changed(config: Config, stage: str, **keys) -> Config:
    hpz = stage.endswith("hpz")
    zero = config.zero.model_copy(update={"hpz": hpz, "offload": False})
    return config.model_copy(update={"zero": zero, **keys})


def build(config: Config, ranks: Ranks) -> Engine:
    # DeepSpeed makes a node's group once in a process, which has one engine elsewhere
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    return scenarios.build(config, ranks)


def matrix(ways: tuple[tuple[str, str], ...], ranks: Ranks) -> dict:
    """Losses, and what torch.compile made of it, of every way; a validation amid the steps."""
    found = {}
    for precision, stage in ways:
        for compiled, recompute in product((False, True), RECOMPUTE):
            config = scenarios.configuration(stage, GLOBAL_IMAGES // ranks.size, precision)
            config = changed(config, stage, recompute=recompute, compile=compiled)
            torch._dynamo.reset()
            counters.clear()
            engine, losses = build(config, ranks), []
            for step in range(STEPS):
                batches = share(step % 2, ranks, GLOBAL_IMAGES // ranks.size)
                losses.append(engine.step(batches).loss)
                if step == 1:
                    engine.predict(batches[0])
            found[f"{precision} {stage} {recompute} {'compiled' if compiled else 'eager'}"] = {
                "losses": losses,
                "breaks": sum(counters["graph_break"].values()),
                "graphs": counters["stats"]["unique_graphs"],
            }
    return found


class Sent:
    """Bytes that this rank sends in rings, by whether they go to all or to its node's group."""

    def __init__(self, backend) -> None:
        self.bytes: Counter = Counter()
        for name in COLLECTIVES:
            if hasattr(backend, name):
                setattr(backend, name, self.counted(name, getattr(backend, name)))

    def counted(self, name, call):
        def collective(*args, **kwargs):
            given = [*args, *kwargs.values()]
            sizes = [t.numel() * t.element_size() for t in given if isinstance(t, torch.Tensor)]
            node = deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP
            group = next((g for g in given if isinstance(g, dist.ProcessGroup)), None)
            ranks = dist.get_world_size(group)
            rings = 2 if name == "all_reduce" else 1
            place = "node" if node is not None and group is node else "all"
            self.bytes[place] += rings * max(sizes, default=0) * (ranks - 1) / ranks
            return call(*args, **kwargs)

        return collective


def wide(stage: str, micro: int, precision: str = "fp32") -> Config:
    """A model whose matrices are larger than what DeepSpeed leaves unpartitioned."""
    config = scenarios.configuration(stage.removesuffix("-hpz"), micro, precision)
    shape = {"width": 320, "heads": 5}
    return changed(config, stage, model=config.model.model_copy(update=shape))


def deep(config: Config) -> Config:
    """Eight blocks of 1.2 million weights, of which DeepSpeed does not keep all."""
    return config.model_copy(update={"model": config.model.model_copy(update={"layers": 8})})


def forgetful(zero: ZeroConfig, gpu: bool) -> dict:
    settings = zero_settings(zero, gpu)
    settings["zero_optimization"].update(FORGETFUL)
    return settings


def travels(ranks: Ranks) -> dict:
    """(planned, counted) bytes of a step with the settings of GPUs, by stage and accumulation."""
    engine_module.uses_gpu = lambda: True
    sent, found = None, {}
    for stage, accumulation in (*product(TRAFFIC, (1, 2)), *FORGOTTEN):
        micro = GLOBAL_IMAGES // ranks.size // accumulation
        config = wide(stage.removesuffix("-forgetful"), micro)
        if stage.endswith("-forgetful"):
            config = deep(config)
            engine_module.zero_settings = plan_module.zero_settings = forgetful
        engine = build(config, ranks)
        sent = sent or Sent(deepspeed.comm.comm.cdb)
        engine.step(share(0, ranks, micro))
        sent.bytes.clear()
        engine.step(share(1, ranks, micro))
        choice = Choice(config, accumulation, None, True)
        plan = communication(choice, ranks.size, ranks.per_node())
        found[f"{stage} {accumulation}"] = {
            place: (plan[place], sent.bytes[place]) for place in ("all", "node")
        }
    return found


def steps(engine: Engine, ranks: Ranks, first: int, last: int) -> list[float]:
    micro = GLOBAL_IMAGES // ranks.size // 2
    return [engine.step(share(step, ranks, micro)).loss for step in range(first, last)]


def hierarchical(folder: Path, ranks: Ranks) -> dict:
    """Losses with and without a node's own copies, and after resumes between both and stage 1."""
    micro = GLOBAL_IMAGES // ranks.size // 2
    found: dict[str, dict] = {"straight": {}, "resumed": {}}
    for stage in ("1", "3", "3-hpz"):
        engine = build(wide(stage, micro), ranks)
        losses = steps(engine, ranks, 0, 3)
        state = {"engine": engine.state()}
        checkpoint.save(folder / f"hpz-{stage}", 3, engine.fragments(), state, ranks)
        found["straight"][stage] = losses + steps(engine, ranks, 3, 6)
    for source, stage in (("3-hpz", "3-hpz"), ("3-hpz", "1"), ("1", "3-hpz")):
        engine = build(wide(stage, micro), ranks)
        # a trained engine with gathered weights, of which copies are made as they are partitioned
        steps(engine, ranks, 7, 9)
        engine.predict(share(0, ranks, micro)[0])
        path, _ = checkpoint.find(folder / f"hpz-{source}", ranks)
        manifest = checkpoint.load(path, engine.fragments())
        engine.restored(manifest["state"]["engine"])
        found["resumed"][f"{source}->{stage}"] = steps(engine, ranks, 3, 6)
    return found


def main(argv: list[str]) -> None:
    folder, what = Path(argv[0]), argv[1]
    with start() as ranks:
        if what in WAYS:
            found = matrix(WAYS[what], ranks)
        else:
            # before the collectives are counted
            found = {"hierarchical": hierarchical(folder, ranks), "travels": travels(ranks)}
        if ranks.main:
            (folder / f"{what}-{ranks.size}.json").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    run_cli(main)  # its end spares us that of C++ threads
