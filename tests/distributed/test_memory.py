"""The memory plan against what a step allocates, on processors."""

import json
from itertools import product

import pytest

from tests.distributed import memory_scenarios

SMALL = "data.image_size=256"


def case(ranks, micro, accumulation=1, **keys):
    batch = f"batch.global_images={ranks * micro * accumulation} batch.micro={micro}"
    return " ".join([SMALL, batch, *(f"{k.replace('_', '.')}={v}" for k, v in keys.items())])


def few(ranks):
    """The two that DeepSpeed allocates most for beside the state."""
    return [
        case(ranks, 2, 2, zero_stage=2, precision="fp32"),
        case(ranks, 2, zero_stage=3, precision="bf16", recompute="full"),
    ]


def all_ways(ranks):
    stages, precisions = (1, 2, 3), ("fp32", "bf16")
    for stage, precision in product(stages, precisions):
        keys = {"zero_stage": stage, "precision": precision}
        yield from (case(ranks, micro, **keys) for micro in (1, 4))
        yield case(ranks, 2, 2, **keys)
        yield from (case(ranks, 4, recompute=r, **keys) for r in ("selective", "full"))
        yield from (case(ranks, 4, model_tokeniser=t, **keys) for t in ("aim", "affine"))


def assert_planned(launch, folder, ranks, cases):
    done = launch(ranks, memory_scenarios.__file__, folder, *cases, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / f"memory-{ranks}.json").read_text())
    ratios = {case: planned / measured for case, (planned, measured) in found.items()}
    assert ratios and len(ratios) == len(cases)
    wrong = {case: ratio for case, ratio in ratios.items() if not 0.9 <= ratio <= 1.1}
    assert not wrong


def test_the_plan_is_within_a_tenth_of_the_peak(launch, tmp_path):
    assert_planned(launch, tmp_path, 2, few(2))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_for_every_stage_precision_recomputation_and_tokeniser(launch, tmp_path, ranks):
    assert_planned(launch, tmp_path, ranks, list(all_ways(ranks)))
