"""The whole command, as users start it: train, resume anywhere, fail clearly."""

import gzip
import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from astropt_ds.data.simulate import simulate_survey
from astropt_ds.data.split import Split
from astropt_ds.data.store import Folder
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from tests.distributed.runs import alone, losses, records, train

PARTS = ("data_s", "forward_s", "backward_s", "optimizer_s", "communication_s", "other_s")

# ---- the main job ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def survey(galaxies, tmp_path_factory):
    """(shards, image size): real galaxies where they lie, simulated stamps elsewhere."""
    folder = tmp_path_factory.mktemp("main")
    fractions = {"val_fraction": 0.1, "test_fraction": 0.05}
    if galaxies:
        job = Job(
            images=galaxies,
            catalogue=galaxies / "manifest.csv",
            filter='subset in ["legacy_512", "gz_examples"]',
            group_column="group",
            output=folder / "shards",
            samples_per_shard=100,
            **fractions,
        )
        size = 416
    else:
        stamps = simulate_survey(folder / "stamps", 400, side=128, seed=0, processes=2)
        catalogue, output = stamps / "catalogue.csv", folder / "shards"
        job = Job(images=stamps, catalogue=catalogue, output=output, **fractions)
        size = 128
    make_shards(job)
    return job.output, size


def test_the_main_job_beats_both_baselines(launch, survey, tmp_path):
    shards, size = survey
    run = tmp_path / "run"
    done = launch(
        2,
        *("-m", "astropt_ds.train", "--config", "1m", f"data.path={shards}", f"run.dir={run}"),
        *(f"data.image_size={size}", "zero.stage=3", "precision=fp32", "run.steps=50"),
        *("batch.global_images=16", "schedule.warmup=20", "optim.lr=2e-3"),
        *("eval.every=50", "eval.images=32", "checkpoint.every=50"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = records(run, "val")
    assert (first["step"], last["step"]) == (0, 50)
    assert first["loss"] == pytest.approx(
        first["loss_zeros"], rel=0.01
    )  # it starts knowing nothing
    assert last["loss"] < 0.97 * min(last["loss_zeros"], last["loss_previous"])
    train = records(run, "train")
    assert [r["step"] for r in train] == list(range(1, 51))
    tokens = (size // 16) ** 2
    assert train[-1]["samples"] == 800 and train[-1]["tokens"] == 800 * tokens
    assert train[-1]["flops"] == 50 * train[0]["flops"] > 0
    for key in ("lr", "grad_norm", "skipped", "tokens_per_s", "data_wait_s", "memory_bytes"):
        assert all(isinstance(r[key], (int, float)) for r in train), key
    # The stamps of 320 pixels among the real ones keep their slots and are named.
    bad = [r for r in records(run, "event") if r["event"] == "bad_sample"]
    assert len(bad) == train[-1]["bad_samples"]
    assert all("smaller than" in r["text"] for r in bad)
    picture = Image.open(run / "samples" / "step-00000050.png")
    assert picture.size[1] == 2 * size + 4
    environment = json.loads((run / "environment.json").read_text())
    assert environment["attention_kernel"] == "sdpa" and environment["ranks"] == 2
    assert (environment["micro_batch"], environment["accumulation"]) == (8, 1)
    config = yaml.safe_load((run / "config.yaml").read_text())
    # what was settled here must not bind a resume on other ranks
    assert config["zero"]["stage"] == 3 and config["batch"]["micro"] == "auto"
    assert (run / "latest").read_text() == "step-00000050\n"
    assert "validation loss" in (run / "complete").read_text()
    assert "ETA" in done.stdout and "images/s" in done.stdout and "tokens/s" in done.stdout


# ---- resume, and the three ways to start -----------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(launch, tiny, tmp_path_factory):
    """Six steps on two ranks under ZeRO-3, with a checkpoint after three."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = train(launch, tiny, run, 2, "run.steps=6", "zero.stage=3", "data.workers=1")
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def interrupted(uninterrupted, folder):
    """The same run as if it had died in step 6: the records go on past its last checkpoint."""
    run = folder / "run"
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "complete").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # torn by the crash
    return run


def check_continues(run, done, uninterrupted, tolerance):
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming" in done.stdout and "at step 3 of 6" in done.stdout
    expected, found = losses(uninterrupted), losses(run)
    assert [r[0] for r in found] == [1, 2, 3, 4, 5, 6]  # each step once
    assert found[:3] == expected[:3]
    if tolerance:
        assert np.abs(np.subtract(found, expected)).max() <= tolerance
    else:
        assert found == expected
    val, expected_val = records(run, "val"), records(uninterrupted, "val")
    assert [r["step"] for r in val] == [0, 4, 6]
    for a, b in zip(val, expected_val, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
        assert (a["loss_zeros"], a["n"]) == (b["loss_zeros"], b["n"])
    assert (run / "complete").exists()


@pytest.mark.parametrize("ranks, stage, launcher", [(1, 1, "python"), (3, 0, "torchrun")])
def test_a_resumed_run_continues_as_if_uninterrupted(
    launch, tiny, uninterrupted, tmp_path, ranks, stage, launcher
):
    run = interrupted(uninterrupted, tmp_path)
    done = train(launch, tiny, run, ranks, "run.steps=6", f"zero.stage={stage}", launcher=launcher)
    check_continues(run, done, uninterrupted, 1e-5)


@pytest.fixture(scope="module")
def profiled(launch, tiny, uninterrupted, tmp_path_factory):
    """That run, resumed as it was, but profiled; its fifth step alone traced."""
    run = interrupted(uninterrupted, tmp_path_factory.mktemp("profiled"))
    keys = ("run.steps=6", "zero.stage=3", "run.profile=true", "run.trace=[5,6]")
    return run, train(launch, tiny, run, 2, *keys, launcher="deepspeed")


def test_where_nothing_changed_a_resume_is_bitwise_also_under_the_profile(profiled, uninterrupted):
    check_continues(*profiled, uninterrupted, 0.0)


def test_the_parts_of_a_profiled_step_add_up_to_it(profiled):
    run, _ = profiled
    plain, steps = records(run)[:3], records(run)[3:]
    assert not any(part in r for part in PARTS[1:] for r in plain)  # where it was not asked for
    tokens = steps[-1]["tokens"] / steps[-1]["step"]
    for r in steps:
        assert sum(r[part] for part in PARTS) == pytest.approx(tokens / r["tokens_per_s"])
        assert all(r[part] > 0 for part in PARTS)  # two ranks under ZeRO-3 do communicate
        assert r["data_s"] > r["data_wait_s"]


def test_a_trace_of_each_rank_has_the_products_and_collectives_of_its_steps(profiled):
    run, _ = profiled
    files = sorted((run / "trace").iterdir())
    assert [f.name for f in files] == [f"step-00000005-rank-{r:05d}.json.gz" for r in (0, 1)]
    for file in files:
        with gzip.open(file) as text:
            names = [event.get("name") for event in json.load(text)["traceEvents"]]
        assert {"aten::mm", "c10d::_allgather_base_", "c10d::allreduce_"} <= set(names)
        assert names.count("aten::_fused_adamw_") == 2  # both groups, of one step


# ---- bad input, as the command line meets it -------------------------------------------------


def test_a_bad_image_is_counted_and_named_and_too_many_stop_the_run(launch, tiny, shards, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    split = Split(Folder(copy), "train")
    for row in range(len(split)):
        shard, _ = split.place(row)
        path, entry = copy / shard, split.index[row]
        data = bytearray(path.read_bytes())
        data[int(entry["offset"]) + 100] ^= 0xFF
        path.write_bytes(data)
    run = tmp_path / "run"
    done = alone(
        launch, tiny, run, "run.steps=2", f"data.path={copy}", "data.max_bad_fraction=0.02"
    )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: 12 of 12 samples failed, more than data.max_bad_fraction=0.02")
    faults = [r for r in records(run, "event") if r["event"] == "bad_sample"]
    assert len(faults) == 12
    assert all(r["shard"].startswith("train-") and r["key"].startswith("g") for r in faults)
    steps = records(run, "train")
    assert [r["bad_samples"] for r in steps] == [12]
    assert steps[0]["loss"] == 0.0  # weight zero, with the denominator kept


@pytest.mark.parametrize(
    "override, message",
    [
        ("run.resume=never", "holds a run already and run.resume=never"),
        ("seed=1", "was made with seed=0; this run has 1"),
        ("batch.global_images=6", "was made with batch.global_images=12; this run has 6"),
        ("run.resume=nowhere", "run.resume=nowhere: there is no checkpoint in "),
        ("model.width=64", "was made with model.width=32; this run has 64: keep the old value"),
        ("attention.kernel=flash", "attention.kernel=flash needs a CUDA device"),
        ("wandb.mode=online", "wandb.mode=online: "),
    ],
)
def test_a_run_that_does_not_fit_its_folder_is_refused(
    launch, tiny, uninterrupted, tmp_path, override, message
):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    done = alone(launch, tiny, run, "run.steps=8", override)
    assert done.returncode == 2
    for path in uninterrupted.rglob("*"):  # and the folder is left as it was
        if path.is_file():
            assert (run / path.relative_to(uninterrupted)).read_bytes() == path.read_bytes()
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_going_back_needs_another_folder(launch, tiny, uninterrupted, tmp_path):
    earlier = uninterrupted / "checkpoints" / "step-00000003"
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    inside = f"run.resume={run / 'checkpoints' / earlier.name}"
    done = alone(launch, tiny, run, inside, "run.steps=6")
    assert done.returncode == 2
    assert "holds step-00000006 of its own; name another run.dir" in done.stderr.splitlines()[-1]
    other = tmp_path / "other"
    done = alone(launch, tiny, other, f"run.resume={earlier}", "run.steps=6")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r[0] for r in losses(other)] == [4, 5, 6]
    assert np.abs(np.subtract(losses(other), losses(uninterrupted)[3:])).max() <= 1e-5


def test_the_command_that_begins_a_run_from_another_goes_on_with_it(
    launch, tiny, uninterrupted, tmp_path
):
    earlier = uninterrupted / "checkpoints" / "step-00000003"
    run = tmp_path / "run"
    for steps in (4, 6):
        done = alone(launch, tiny, run, f"run.resume={earlier}", f"run.steps={steps}")
        assert done.returncode == 0, done.stderr[-3000:]
    assert "at step 4 of 6" in done.stdout
    assert np.abs(np.subtract(losses(run), losses(uninterrupted)[3:])).max() <= 1e-5
    done = alone(launch, tiny, run, f"run.resume={uninterrupted}", "run.steps=6")
    assert done.returncode == 2
    assert "holds step-00000006 of its own; name another run.dir" in done.stderr.splitlines()[-1]


def test_a_run_that_fell_back_keeps_what_it_saves_from_then_on(
    launch, tiny, uninterrupted, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "checkpoints" / "step-00000006" / "complete").unlink()
    done = alone(launch, tiny, run, "run.steps=5", "checkpoint.keep=1")
    assert done.returncode == 0, done.stderr[-3000:]
    whole, damaged = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert whole == "step-00000005" and damaged.startswith("step-00000006.damaged-")
    assert f"renamed to {damaged}" in done.stdout
    done = alone(launch, tiny, run, "run.steps=6", "checkpoint.keep=1")
    assert "at step 5 of 6" in done.stdout
    assert np.abs(np.subtract(losses(run), losses(uninterrupted))).max() <= 1e-5


@pytest.mark.parametrize("file", ["rank-00001.safetensors", "manifest.json"])
def test_damage_in_the_newest_checkpoint_falls_back_to_the_one_before(
    launch, tiny, uninterrupted, tmp_path, file
):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    path = run / "checkpoints" / "step-00000006" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    if file == "manifest.json":
        data = data[: len(data) // 2]
    path.write_bytes(data)
    done = alone(launch, tiny, run, "run.steps=6")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "passed over" in done.stdout and "at step 3 of 6" in done.stdout
    assert np.abs(np.subtract(losses(run), losses(uninterrupted))).max() <= 1e-5


def test_wandb_offline_writes_its_run_below_the_runs_folder(launch, tiny, tmp_path):
    run = tmp_path / "run"
    done = alone(launch, tiny, run, "run.steps=2", "wandb.mode=offline")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
