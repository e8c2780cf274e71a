"""What launches of several ranks save for tests of conversion, by our layer and by DeepSpeed's own.

Run by torchrun: ``convert_scenarios.py FOLDER``, first on two ranks. One state, trained there, is
loaded into every engine, at every number of ranks, and saved by it.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

from astropt_ds.config import Config
from astropt_ds.data.batch import Batch
from astropt_ds.errors import run_cli
from astropt_ds.model import AstroPT
from astropt_ds.optim import adamw
from astropt_ds.tokens import standardise
from astropt_ds.training import checkpoint
from astropt_ds.training import engine as engine_module
from astropt_ds.training.engine import Engine
from astropt_ds.training.facts import training_facts
from astropt_ds.training.ranks import Ranks, start
from astropt_ds.training.resume import identity
from astropt_ds.zero import zero_settings
from tests.distributed.scenarios import (
    GLOBAL_IMAGES,
    STAGES,
    build,
    configuration,
    global_batch,
    share,
)

STEPS = 5
ENGINES = [
    *(("fp32", stage) for stage in STAGES),
    *(("bf16", stage) for stage in ("1", "2", "3")),
]
# Other ways in which DeepSpeed can be told to lay its partitions out.
VARIANTS = {
    "subgroups": ("3", {"sub_group_size": 5000}),
    "robin": ("2", {"round_robin_gradients": True}),
    "aligned": ("1", {"parameter_alignment": True}),
    "elastic": ("1", {"elastic_checkpoint": True}),
}
TAG = "some-tag"
HALVES = {"bf16": {}, "fp16": {"initial_scale_power": 4}}  # at stage 0, of a state of their own
UNIVERSAL = ("fp32-1", "fp32-3", "bf16-2")


def prediction_batch() -> Batch:
    patches, _ = global_batch(0)
    return Batch(patches[:4], torch.ones(4), torch.arange(4))


def run_state(engine: Engine) -> dict:
    """What a run stores beside the fragments."""
    config = engine.config
    return {
        "engine": engine.state(),
        "facts": training_facts(config, STEPS, engine.updates, "hash", {"loss": 0.5}),
        "bad_samples": 0,
        "origin": None,
        "init_from": None,
        "identity": identity(config, "hash"),
        "config": config.model_dump(mode="json"),
    }


def train(folder: Path, ranks: Ranks) -> None:
    """The state that all are to hold."""
    micro = GLOBAL_IMAGES // ranks.size
    engine = build(configuration("3", micro), ranks)
    for step in range(STEPS):
        engine.step(share(step, ranks, micro))
    checkpoint.save(folder / "origin", STEPS, engine.fragments(), run_state(engine), ranks)
    engine.engine.save_checkpoint(str(folder / "deepspeed" / "trained"), tag=TAG)


def holding(folder: Path, config: Config, ranks: Ranks) -> Engine:
    """An engine in that state."""
    engine = build(config, ranks)
    path, _ = checkpoint.find(folder / "origin", ranks)
    assert path is not None
    manifest = checkpoint.load(path, engine.fragments())
    engine.restored(manifest["state"]["engine"])
    return engine


def save_variants(folder: Path, micro: int, ranks: Ranks) -> None:
    for variant, (stage, keys) in VARIANTS.items():
        config = configuration(stage, micro)
        values = zero_settings(config.zero, gpu=False)
        values["zero_optimization"].update(keys)
        engine_module.zero_settings = lambda zero, gpu, values=values: deepcopy(values)
        engine = holding(folder, config, ranks)
        path = folder / "deepspeed" / f"{ranks.size}-{variant}"
        engine.engine.save_checkpoint(str(path), tag=TAG)
    engine_module.zero_settings = zero_settings


def save_half(folder: Path, precision: str) -> None:
    """Stage 0 in half precision, which our engine refuses, and its fp32 masters by name."""
    config = configuration("0", GLOBAL_IMAGES)
    model = AstroPT(config.model, seed=5)
    values = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        precision: {"enabled": True, **HALVES[precision]},
    }
    optimizer = adamw(model, config.optim)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=values)
    dtype = next(model.parameters()).dtype
    for _ in range(2):
        predictions, _ = engine(standardise(prediction_batch().patches)[:, :-1].to(dtype))
        engine.backward(predictions.float().square().sum())
        engine.step()
    engine.save_checkpoint(str(folder / "deepspeed" / f"{precision}-0"), tag=TAG)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    halves, masters = engine.optimizer.fp16_groups, engine.optimizer.fp32_groups
    by_name = {
        names[id(half)]: master.detach()
        for group in zip(halves, masters, strict=True)
        for half, master in zip(*group, strict=True)
    }
    torch.save(by_name, folder / f"{precision}-0.pt")


def make_universal(folder: Path, name: str) -> None:
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    arguments = argparse.Namespace(
        input_folder=str(folder / name / TAG),
        output_folder=str(folder / f"{name}-universal" / TAG),
        strict=True,
        inject_missing_state=True,
        **options,
    )
    ds_to_universal(arguments)


def main(argv: list[str]) -> None:
    folder = Path(argv[0])
    with start() as ranks:
        if not (folder / "origin").exists():
            train(folder, ranks)
        micro = GLOBAL_IMAGES // ranks.size
        for precision, stage in ENGINES:
            name = f"{ranks.size}-{precision}-{stage}"
            engine = holding(folder, configuration(stage, micro, precision), ranks)
            predictions, _ = engine.predict(prediction_batch())
            state = run_state(engine)
            checkpoint.save(folder / "ours" / name, STEPS, engine.fragments(), state, ranks)
            engine.engine.save_checkpoint(str(folder / "deepspeed" / name), tag=TAG)
            if ranks.main:
                np.save(folder / f"{name}.npy", predictions.numpy())
        save_variants(folder, micro, ranks)
        for precision in HALVES if ranks.size == 1 else ():
            save_half(folder, precision)
        dist.barrier()
        if ranks.main and ranks.size == 2:
            for name in UNIVERSAL:
                make_universal(folder / "deepspeed", f"{ranks.size}-{name}")
        dist.barrier()


if __name__ == "__main__":
    run_cli(main)  # its end spares us that of C++ threads
