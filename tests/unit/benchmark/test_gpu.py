import time

import pytest

from astropt_ds.benchmark import gpu
from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.plan import usable


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "model: {layers: 2, heads: 2, width: 32}\ndata: {image_size: 64}\nzero: {stage: 3}\n"
    )
    return str(path)


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def one_case(tiny, scratch):
    """Measure one, on the processor, for a minute at most."""

    def run(*keys, seconds=60):
        case = ["batch.micro=2", "batch.global_images=2", *keys]
        return gpu._run(tiny, case, scratch, time.monotonic() + seconds, None)

    return run


@pytest.mark.slow
def test_ways_are_measured_and_the_fastest_again_by_part_and_with_a_whole_batch(
    tiny, scratch, monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "STAGES", (3,))
    monkeypatch.setattr(gpu, "MICROS", (48,))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    result = gpu.measure_gpu(tiny, scratch)
    assert result["device"] == "cpu"
    compiled, eager = result["cases"]
    (profile,), (whole,) = result["profile"], result["global_batch"]
    for case in (compiled, eager, profile, whole):
        assert case["outcome"] == gpu.MEASURED, case
        first, third = case["step_s_quartiles"]
        assert 0 < first <= case["step_s"] <= third
        images = case["micro"] * case["accumulation"]
        assert case["tokens_per_s"] == pytest.approx(16 * images / case["step_s"])
        assert case["mfu"] is case["mfu_causal"] is case["hfu"] is None  # no peak is known
        assert case["memory_bytes"] > case["plan_bytes"] > 0
        assert all(0.3 < loss < 0.6 for loss in case["losses"])
    assert (compiled["compile"], eager["compile"]) == (True, False)
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-2)
    best = max((compiled, eager), key=lambda case: case["tokens_per_s"])
    assert profile["compile"] == whole["compile"] == best["compile"]
    assert (compiled["steps"], profile["steps"], whole["steps"]) == (20, 20, 24)
    assert whole["accumulation"] == 7  # 336 images: 48 do not divide 320
    assert not compiled["parts_s"] and not whole["parts_s"]
    assert sum(profile["parts_s"].values()) == pytest.approx(profile["step_s"], rel=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and " 48 x   7 " in lines[3]


def test_what_there_was_no_time_for_is_listed(tiny, scratch, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    result = gpu.measure_gpu(tiny, scratch, minutes=0)
    assert len(result["cases"]) == len(gpu.STAGES) * len(gpu.MICROS) * 2
    assert {case["outcome"] for case in result["cases"]} == {"not run: the time was over"}
    assert result["profile"] == result["global_batch"] == []


def test_a_case_out_of_memory_is_recorded_as_such(one_case):
    images = 4_000_000  # of 65,536 tokens: 200 TB of patches
    large = ("data.image_size=4096", "model.block_size=65536")
    found = one_case(*large, f"batch.micro={images}", f"batch.global_images={images}")
    assert found["outcome"] == gpu.OUT_OF_MEMORY


def test_a_case_that_fails_says_why(one_case):
    outcome = one_case("attention.kernel=cudnn")["outcome"]
    assert outcome.startswith("failed (")
    assert "attention.kernel=cudnn needs a CUDA device" in outcome


def test_a_case_that_takes_too_long_is_ended(one_case):
    assert one_case(seconds=0.5)["outcome"].startswith("not measured: the time was over")


@pytest.mark.parametrize("size, largest", [(84.9e9, 16), (150.1e9, 48)])
def test_what_fits_is_measured_the_configurations_own_stage_and_largest_batches_first(
    size, largest
):
    config = load_config("2100m")
    found = [load_config("2100m", case) for case in gpu.cases("2100m", config, size)]
    assert [case.zero.stage for case in found[:6]] == [3, 3, 1, 1, 2, 2]
    assert [case.compile for case in found[:2]] == [True, False]
    assert found[0].batch.micro == largest
    assert all(gpu._plan(case, size) <= usable(size) for case in found)
    for stage in gpu.STAGES:
        own = [c.batch.micro for c in found if c.zero.stage == stage and c.compile]
        assert own == sorted(own, reverse=True) and own[-1] == 1
    assert all(case.batch.split(1) == (case.batch.micro, 1) for case in found)


def test_the_fastest_is_of_the_configurations_own_stage():
    def case(stage, rate):
        return {"outcome": gpu.MEASURED, "stage": stage, "tokens_per_s": rate}

    found = [case(3, 1.0), case(3, 2.0), case(1, 9.0), {"outcome": gpu.OUT_OF_MEMORY, "stage": 3}]
    assert gpu.fastest(found, 3) == 1
    assert gpu.fastest(found, None) == 2
    assert gpu.fastest(found, 2) is None


def test_a_preset_that_is_none_is_one_line(scratch):
    with pytest.raises(UserError, match="--config none: no such preset; one of 1m "):
        gpu.measure_gpu("none", scratch)
