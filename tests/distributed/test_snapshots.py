"""Snapshots of a run's weights, and runs that start from such weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from astropt_ds import load_model
from astropt_ds.config import ModelConfig
from astropt_ds.model import AstroPT
from astropt_ds.model_folder.config_json import read_model_config
from tests.distributed.runs import alone, events, losses, records, train

FILES = ["README.md", "config.json", "model.safetensors", "modeling_astropt.py"]
COURSE = (
    "run.steps=6",
    "zero.stage=3",
    "snapshot.schedule=log",
    "snapshot.count=4",
    "eval.every=3",
)


@pytest.fixture(scope="module")
def pretrained(launch, tiny, tmp_path_factory):
    """A run on two ranks under ZeRO-3 with snapshots of steps 0, 1, 2 and 6."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    done = train(launch, tiny, run, 2, *COURSE)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def snapshot(run, step):
    return run / "snapshots" / f"step-{step:08d}"


def test_every_snapshot_is_a_model_folder_with_its_facts(pretrained):
    steps = [0, 1, 2, 6]
    found = sorted(path.name for path in (pretrained / "snapshots").iterdir())
    assert found == [snapshot(pretrained, step).name for step in steps]
    train_records = {r["step"]: r for r in records(pretrained)}
    for step in steps:
        folder = snapshot(pretrained, step)
        assert sorted(p.name for p in folder.iterdir()) == FILES
        facts = json.loads((folder / "config.json").read_text())["training"]
        assert (facts["step"], facts["updates"], facts["samples"]) == (step, step, 12 * step)
        if step:
            for key in ("tokens", "flops", "loss"):
                assert facts[key] == train_records[step][key]
    saved = [event for event in events(pretrained, "snapshot")]
    assert [event["step"] for event in saved] == steps


def test_the_first_holds_the_initial_weights_and_the_last_those_of_the_checkpoint(pretrained):
    config = read_model_config(snapshot(pretrained, 0))
    initial = dict(AstroPT(config, seed=0).named_parameters())
    first = load_file(snapshot(pretrained, 0) / "model.safetensors")
    assert all(torch.equal(first[name], parameter) for name, parameter in initial.items())
    last = load_file(snapshot(pretrained, 6) / "model.safetensors")
    assert not torch.equal(
        last["transformer.h.0.mlp.c_fc.weight"], first["transformer.h.0.mlp.c_fc.weight"]
    )
    checkpoint = pretrained / "checkpoints" / "step-00000006"
    tensors = json.loads((checkpoint / "manifest.json").read_text())["tensors"]
    files = {path.name: load_file(path) for path in checkpoint.glob("rank-*.safetensors")}
    assert tensors.keys() == last.keys()
    for name, tensor in tensors.items():
        pieces = [
            files[file][f"weight/{name}/{at}"] for at, _, file in tensor["fragments"]["weight"]
        ]
        assert torch.equal(torch.cat(pieces), last[name].view(-1))


def test_a_run_its_checkpoint_and_its_last_snapshot_load_as_the_same_model(pretrained):
    paths = [pretrained, pretrained / "checkpoints" / "step-00000006", snapshot(pretrained, 6)]
    run, checkpoint, last = (dict(load_model(path).named_parameters()) for path in paths)
    assert run.keys() == checkpoint.keys() == last.keys()
    for name, parameter in last.items():
        assert torch.equal(run[name], parameter) and torch.equal(checkpoint[name], parameter)


def test_a_run_starts_from_the_weights_of_another(launch, tiny, pretrained, tmp_path):
    run = tmp_path / "run"
    weights = tmp_path / "weights"
    shutil.copytree(snapshot(pretrained, 6), weights)
    course = ("run.steps=2", "seed=1", "zero.stage=2", "snapshot.schedule=manual")
    more = ("snapshot.steps=[0,2]", "snapshot.dtype=bf16", f"model.init_from={weights}")
    done = train(launch, tiny, run, 2, *course, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"starting from the weights of {weights} at step 0 of 2" in done.stdout
    # the same weights on the same validation set
    assert records(run, "val")[0]["loss"] == records(pretrained, "val")[-1]["loss"]
    original = load_file(weights / "model.safetensors")
    half = load_file(snapshot(run, 0) / "model.safetensors")
    assert all(torch.equal(half[name], original[name].bfloat16()) for name in original)
    # goes on from its own checkpoint, not from those weights again, even where they are gone
    shutil.rmtree(weights)
    again = ("run.steps=3", "seed=1")
    done = alone(launch, tiny, run, *again, f"model.init_from={weights}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "at step 2 of 3" in done.stdout
    assert [step for step, *_ in losses(run)] == [1, 2, 3]
    done = alone(launch, tiny, run, *again, f"model.init_from={snapshot(pretrained, 0)}")
    assert done.returncode == 2
    assert "has weights already, begun from" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.width=64", "config.json: model.width is 32 there and 64 here"),
        ("model.layers=3", "config.json: model.layers is 2 there and 3 here"),
        ("model.tokeniser=aim", "model.tokeniser is relu there and aim here; "),
        ("model.init_from=nowhere", "nowhere/config.json: cannot be read"),
        ("model.init_from={endless}", "transformer.ln_f.weight has values that are not finite"),
        ("model.init_from={damaged}", "model.safetensors: is no whole safetensors file"),
        ("model.init_from={foreign}", "model.safetensors: missing: transformer.ln_f.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(launch, tiny, pretrained, tmp_path, override, message):
    run, weights = tmp_path / "run", snapshot(pretrained, 6)
    damaged, foreign, endless = (tmp_path / name for name in ("damaged", "foreign", "endless"))
    for folder in (damaged, foreign, endless):
        shutil.copytree(weights, folder)
    data = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(data[: len(data) // 2])
    rewrite_without_final_norm(foreign)
    tensors = load_file(endless / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = torch.inf
    save_file(tensors, endless / "model.safetensors")
    override = override.format(damaged=damaged, foreign=foreign, endless=endless)
    done = alone(launch, tiny, run, "run.steps=2", f"model.init_from={weights}", override)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert not (run / "metrics.jsonl").exists()


def rewrite_without_final_norm(folder):
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert isinstance(read_model_config(folder), ModelConfig)
