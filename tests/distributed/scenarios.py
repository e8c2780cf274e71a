"""What one launch of several ranks computes for test_engine.py; writes a JSON of results.

Run by torchrun: ``scenarios.py FOLDER [full | back]``. One launch walks through all stages and
accumulations, because starting processes costs more than the steps themselves.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from astropt_ds.config import Config
from astropt_ds.config_source import load_config
from astropt_ds.data.batch import Batch
from astropt_ds.errors import run_cli
from astropt_ds.model import AstroPT
from astropt_ds.training import checkpoint
from astropt_ds.training.engine import Engine, partitioned
from astropt_ds.training.ranks import Ranks, start

GLOBAL_IMAGES = 24  # divides by 1, 2 and 3 ranks, with accumulation 1 and 4
STEPS = 20
SAVED_AT = 10
CLIP = 0.015  # amid the norms seen, so that clipping takes part
STAGES = ("0", "1", "2", "3", "3-offload")


def accumulations(ranks: int) -> tuple[int, ...]:
    """Three ranks on two cores are slow; what accumulation does shows on one and two."""
    return (1, 4) if ranks < 3 else (1,)


def resumes(full: bool) -> list[tuple[str, str]]:
    """(stage that saved, stage that resumes): each its own and the next one's, or all."""
    if full:
        return [(source, stage) for source in STAGES for stage in STAGES]
    following = zip(STAGES, (*STAGES[1:], STAGES[0]), strict=True)
    return [*((stage, stage) for stage in STAGES), *following]


def configuration(stage: str, micro: int, precision: str = "fp32", clip: float = CLIP) -> Config:
    """A model with odd sizes, so that partitions are padded and straddle tensors."""
    number, _, offload = stage.partition("-")
    return load_config(
        "1m",
        [
            *("model.layers=2", "model.heads=3", "model.width=33", "model.block_size=17"),
            *("data.image_size=64", "schedule.warmup=5", "schedule.decay_until=18"),
            *(f"zero.stage={number}", f"zero.offload={bool(offload)}", f"precision={precision}"),
            *(f"batch.global_images={GLOBAL_IMAGES}", f"batch.micro={micro}", "optim.lr=3e-3"),
            f"optim.clip={clip}",
        ],
    )


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, 16, 768) uint8 patches that share a pattern to learn, and weights, some zero."""
    rng = np.random.default_rng(step)
    ramp = np.linspace(0, 120, 768)[None, None] * rng.uniform(0, 1, (GLOBAL_IMAGES, 1, 1))
    noise = rng.normal(100, 20, (GLOBAL_IMAGES, 16, 768))
    weights = (rng.uniform(size=GLOBAL_IMAGES) > 0.1).astype(np.float32)
    patches = (ramp + noise).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(patches), torch.from_numpy(weights)


def share(step: int, ranks: Ranks, micro: int) -> list[Batch]:
    """This rank's micro-batches of a step, dealt as the loader deals them."""
    patches, weights = global_batch(step)
    batches = []
    for first in range(ranks.rank * micro, GLOBAL_IMAGES, ranks.size * micro):
        part = slice(first, first + micro)
        rows = torch.arange(GLOBAL_IMAGES)[part]
        batches.append(Batch(patches[part], weights[part], rows))
    return batches


def build(config: Config, ranks: Ranks) -> Engine:
    with partitioned(config, ranks):
        model = AstroPT(config.model, seed=5)
    return Engine(model, config, ranks)


def weights_hash(engine: Engine, ranks: Ranks) -> str:
    """Of the whole logical weights, put together from all ranks' fragments."""
    parts = [
        (f.name, f.offset, f.values.cpu().numpy().copy())
        for f in engine.fragments()
        if f.state == "weight" and f.owned
    ]
    everything = sorted(
        (part for rank in ranks.gather(parts) for part in rank), key=lambda p: (p[0], p[1])
    )
    digest = hashlib.sha256()
    names: dict[str, list[np.ndarray]] = {}
    for name, _, values in everything:
        names.setdefault(name, []).append(values)
    for name, pieces in names.items():
        digest.update(name.encode() + np.concatenate(pieces).tobytes())
    return digest.hexdigest()


def seen_weights_agree(engine: Engine, ranks: Ranks) -> bool:
    """Whether what the forward pass uses is the fp32 state, after a load."""
    patches, _ = global_batch(0)
    batch = Batch(patches[:4], torch.ones(4), torch.arange(4))
    predictions, _ = engine.predict(batch)
    fresh = AstroPT(engine.config.model, seed=0)
    state = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    parts = [
        (f.name, f.offset, f.values.cpu().numpy().copy())
        for f in engine.fragments()
        if f.state == "weight" and f.owned
    ]
    for rank in ranks.gather(parts):
        for name, offset, values in rank:
            flat = state[name].view(-1)
            flat[offset : offset + len(values)] = torch.from_numpy(values)
    fresh.load_state_dict(state)
    fresh.to(torch.bfloat16 if engine.config.precision == "bf16" else torch.float32)
    from astropt_ds.tokens import standardise

    expected, _ = fresh(standardise(batch.patches)[:, :-1])
    return torch.allclose(predictions, expected.float(), atol=1e-6)


def train(engine: Engine, ranks: Ranks, micro: int, start_step: int, stop: int) -> dict:
    results = [engine.step(share(step, ranks, micro)) for step in range(start_step, stop)]
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "lrs": [r.lr for r in results],
    }


# ---- checkpoints of other numbers of ranks ----

# (stage that saves, stage that resumes)
ARRANGEMENTS = {"fp32": (("3", "1"), ("0", "3")), "bf16": (("3", "2"), ("1", "3"))}


def saved_by(folder: Path, ranks: int, precision: str, stage: str) -> Path:
    return folder / f"{ranks}-{precision}-{stage}"


def resume(folder: Path, before: int, ranks: Ranks) -> dict:
    """The steps after a checkpoint of another number of ranks, at another stage."""
    found = {}
    micro = GLOBAL_IMAGES // ranks.size
    for precision, arrangements in ARRANGEMENTS.items():
        for source, stage in arrangements:
            engine = build(configuration(stage, micro, precision), ranks)
            path, passed_over = checkpoint.find(saved_by(folder, before, precision, source), ranks)
            assert path is not None, passed_over
            manifest = checkpoint.load(path, engine.fragments())
            engine.restored(state := manifest["state"]["engine"])
            found[f"{precision} {source}->{stage}"] = {
                "agree": seen_weights_agree(engine, ranks) and engine.state() == state,
                **train(engine, ranks, micro, SAVED_AT, STEPS),
            }
    return found


def save(folder: Path, ranks: Ranks) -> dict:
    """A checkpoint of every stage that saves, and the steps after it, uninterrupted."""
    rest = {}
    micro = GLOBAL_IMAGES // ranks.size
    for precision, arrangements in ARRANGEMENTS.items():
        for source, _ in arrangements:
            engine = build(configuration(source, micro, precision), ranks)
            train(engine, ranks, micro, 0, SAVED_AT)
            path = saved_by(folder, ranks.size, precision, source)
            state = {"engine": engine.state()}
            checkpoint.save(path, SAVED_AT, engine.fragments(), state, ranks)
            rest[f"{precision} {source}"] = train(engine, ranks, micro, SAVED_AT, STEPS)
    return rest


def elastic(folder: Path, ranks: Ranks) -> None:
    """Resume what other numbers of ranks have saved so far, and save unless that is done."""
    out = {}
    for before in {1, 2, 3} - {ranks.size}:
        if saved_by(folder, before, "fp32", "3").exists():
            out[f"{before}->{ranks.size}.json"] = resume(folder, before, ranks)
    if not saved_by(folder, ranks.size, "fp32", "3").exists():
        out[f"{ranks.size}.json"] = save(folder, ranks)
    if ranks.main:
        for name, found in out.items():
            (folder / name).write_text(json.dumps(found))


def main(argv: list[str]) -> None:
    folder, full = Path(argv[0]), "full" in argv[1:]
    if "back" in argv[1:]:
        with start() as ranks:
            elastic(folder, ranks)
            dist.barrier()
        return
    saved = folder / "saved"
    kinds = ("parity", "unclipped", "initial", "resumed", "bf16", "bf16_resumed")
    out: dict = {kind: {} for kind in kinds}
    with start() as ranks:
        share_size = GLOBAL_IMAGES // ranks.size
        for stage in STAGES:
            for accumulation in accumulations(ranks.size):
                micro = share_size // accumulation
                engine = build(configuration(stage, micro), ranks)
                name = f"{stage}/{accumulation}"
                out["initial"][name] = weights_hash(engine, ranks)
                out["parity"][name] = train(engine, ranks, micro, 0, STEPS)
        if ranks.size == 1:
            for stage in STAGES:
                engine = build(configuration(stage, GLOBAL_IMAGES, clip=1.0), ranks)
                out["unclipped"][stage] = train(engine, ranks, GLOBAL_IMAGES, 0, STEPS)
        # Every stage's checkpoint at 2 ranks, resumed at other stages on 1, 2 and 3.
        if ranks.size == 2:
            for stage in STAGES:
                engine = build(configuration(stage, share_size), ranks)
                train(engine, ranks, share_size, 0, SAVED_AT)
                state = {"engine": engine.state()}
                checkpoint.save(saved / stage, SAVED_AT, engine.fragments(), state, ranks)
        for source, stage in resumes(full):
            if ranks.size != 2 and source == stage and not full:
                continue
            engine = build(configuration(stage, share_size), ranks)
            path, _ = checkpoint.find(saved / source, ranks)
            manifest = checkpoint.load(path, engine.fragments())
            engine.restored(manifest["state"]["engine"])
            agree = seen_weights_agree(engine, ranks)
            result = train(engine, ranks, share_size, SAVED_AT, STEPS)
            out["resumed"][f"{source}->{stage}"] = {**result, "agree": agree}
        for stage in ("1", "2", "3"):
            engine = build(configuration(stage, share_size, "bf16"), ranks)
            out["initial"][f"bf16-{stage}"] = weights_hash(engine, ranks)
            out["bf16"][stage] = train(engine, ranks, share_size, 0, SAVED_AT)
            path = folder / f"bf16-{stage}"
            if ranks.size == 2:
                state = {"engine": engine.state()}
                checkpoint.save(path, SAVED_AT, engine.fragments(), state, ranks)
            out["bf16"][stage]["rest"] = train(engine, ranks, share_size, SAVED_AT, STEPS)
            again = build(configuration(stage, share_size, "bf16"), ranks)
            found, _ = checkpoint.find(path, ranks)
            manifest = checkpoint.load(found, again.fragments())
            again.restored(manifest["state"]["engine"])
            agree = seen_weights_agree(again, ranks)
            result = train(again, ranks, share_size, SAVED_AT, STEPS)
            out["bf16_resumed"][stage] = {**result, "agree": agree}
        elastic(folder, ranks)
        if ranks.main:
            (folder / f"ranks-{ranks.size}.json").write_text(json.dumps(out))
        dist.barrier()


if __name__ == "__main__":
    run_cli(main)  # its end spares us that of C++ threads
