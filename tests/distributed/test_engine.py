"""ZeRO against a plain torch loop, and checkpoints between all stages and numbers of ranks."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from astropt_ds.model import AstroPT
from astropt_ds.optim import adamw
from astropt_ds.schedule import lr_factor
from astropt_ds.tokens import standardise
from tests.distributed import scenarios
from tests.distributed.scenarios import (
    ARRANGEMENTS,
    GLOBAL_IMAGES,
    SAVED_AT,
    STAGES,
    STEPS,
    global_batch,
)

RANKS = (2, 1, 3)  # two ranks first: the others resume what they saved
CHANGES = ("3->1", "3->2", "1->2", "1->3", "2->1", "2->3")
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
CASES = [(p, *stages) for p, arrangements in ARRANGEMENTS.items() for stages in arrangements]


def walk(launch, folder, *options):
    found = {}
    for ranks in RANKS:
        done = launch(ranks, scenarios.__file__, folder, *options, timeout=1200)
        assert done.returncode == 0, done.stderr[-4000:]
        found[ranks] = json.loads((folder / f"ranks-{ranks}.json").read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def results(launch, folder):
    return walk(launch, folder)


@pytest.fixture(scope="module")
def elastic(launch, folder, results):
    """The folder, once fewer ranks have resumed what more of them saved, too."""
    for ranks in (1, 2):
        done = launch(ranks, scenarios.__file__, folder, "back", timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def plain_loop(clip):
    """The same training as a plain loop: no DeepSpeed, one process, whole batches."""
    config = scenarios.configuration("1", GLOBAL_IMAGES, clip=clip)
    model = AstroPT(config.model, seed=5)
    optimizer = adamw(model, config.optim)
    losses, norms = [], []
    for step in range(STEPS):
        patches, weights = global_batch(step)
        tokens = standardise(patches)
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * lr_factor(step, config.schedule)
        _, loss = model(tokens[:, :-1], tokens[:, 1:], weights)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip).item())
        optimizer.step()
        losses.append(loss.item() * (GLOBAL_IMAGES / weights.sum().item()))
    assert losses[-1] < 0.9 * losses[0]  # it learns, or parity would mean little
    return {"losses": losses, "norms": norms}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are split among threads: the loop uses as many as the launched ranks do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(one_thread):
    found = plain_loop(scenarios.CLIP)
    assert min(found["norms"]) < scenarios.CLIP < max(found["norms"])  # clipped now and then
    return found


def assert_close(a, b, tolerance):
    assert len(a) == len(b)
    worst = max(abs(x - y) for x, y in zip(a, b, strict=True))
    assert worst <= tolerance, f"{worst:.2e}"


@pytest.mark.parametrize(
    "ranks, accumulation", [(r, a) for r in RANKS for a in scenarios.accumulations(r)]
)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_norms_are_those_of_a_plain_loop(results, plain, stage, ranks, accumulation):
    found = results[ranks]["parity"][f"{stage}/{accumulation}"]
    assert_close(found["losses"], plain["losses"], 1e-6)
    assert_close(found["norms"], plain["norms"], 1e-5)


def test_on_one_rank_fp32_losses_are_bitwise_those_of_the_loop_until_clipping_rounds(results):
    expected = plain_loop(clip=1.0)["losses"]
    for stage in STAGES:
        assert results[1]["unclipped"][stage]["losses"] == expected, stage


def test_initial_weights_are_bit_equal_at_every_stage_and_number_of_ranks(results):
    fp32 = {v for r in RANKS for k, v in results[r]["initial"].items() if "bf16" not in k}
    bf16 = {v for r in RANKS for k, v in results[r]["initial"].items() if "bf16" in k}
    assert len(fp32) == 1 and len(bf16) == 1


def test_they_are_those_of_an_unpartitioned_model(results):
    import hashlib

    model = AstroPT(scenarios.configuration("0", GLOBAL_IMAGES).model, seed=5)
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(name.encode() + p.detach().numpy().tobytes())
    assert results[1]["initial"]["3/1"] == digest.hexdigest()


def check_resumes(results, ranks):
    for name, found in results[ranks]["resumed"].items():
        source, _, stage = name.partition("->")
        uninterrupted = results[2]["parity"][f"{source}/1"]
        assert found["agree"], name
        assert found["lrs"] == uninterrupted["lrs"][SAVED_AT:], name
        if ranks == 2 and source == stage:
            assert found["losses"] == uninterrupted["losses"][SAVED_AT:], name
            assert found["norms"] == uninterrupted["norms"][SAVED_AT:], name
        assert_close(
            found["losses"], uninterrupted["losses"][SAVED_AT:], 1e-6 if ranks == 2 else 1e-5
        )


@pytest.mark.parametrize("ranks", RANKS)
def test_a_resume_continues_bitwise_where_it_was_saved_and_closely_elsewhere(results, ranks):
    assert len(results[ranks]["resumed"]) == (10 if ranks == 2 else 5)
    check_resumes(results, ranks)


@pytest.mark.slow
def test_every_stage_resumes_every_stage_on_1_2_and_3_ranks(launch, tmp_path_factory):
    results = walk(launch, tmp_path_factory.mktemp("full"), "full")
    for ranks in RANKS:
        assert len(results[ranks]["resumed"]) == 25
        check_resumes(results, ranks)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_bf16_follows_fp32_and_resumes(results, plain, stage, ranks):
    found = results[ranks]["bf16"][stage]
    assert_close(found["losses"], plain["losses"][:SAVED_AT], 5e-3)
    resumed = results[ranks]["bf16_resumed"][stage]
    assert resumed["agree"]
    reference = results[2]["bf16"][stage]["rest"]["losses"]
    if ranks == 2:
        assert resumed["losses"] == reference
    assert_close(resumed["losses"], reference, 1e-3)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("precision, source, stage", CASES)
def test_losses_go_on_on_another_number_of_ranks_and_at_another_stage(
    elastic, change, precision, source, stage
):
    before, _, _ = change.partition("->")
    found = json.loads((elastic / f"{change}.json").read_text())[f"{precision} {source}->{stage}"]
    expected = json.loads((elastic / f"{before}.json").read_text())[f"{precision} {source}"]
    assert found["agree"]
    assert found["lrs"] == expected["lrs"]
    for key in ("losses", "norms"):
        difference = np.abs(np.subtract(found[key], expected[key])).max()
        assert difference <= TOLERANCE[precision], f"{key}: {difference:.1e}"


def test_the_schedule_is_applied(results):
    config = scenarios.configuration("3", GLOBAL_IMAGES)
    expected = [config.optim.lr * lr_factor(u, config.schedule) for u in range(STEPS)]
    assert results[2]["parity"]["3/1"]["lrs"] == expected
    assert not torch.allclose(torch.tensor(expected), torch.tensor(expected[0]))
