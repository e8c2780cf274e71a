import pytest

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.gpus import GPUS, gpu_named
from astropt_ds.plan import best, communication, course, propose, settle, usable, with_zero

H100 = GPUS["h100"].memory
AUTO = ("zero.stage=auto", "batch.micro=auto")


def config(preset, *overrides):
    return load_config(preset, list(overrides))


@pytest.mark.parametrize("preset, ranks", [("21m", 8), ("830m", 8), ("2100m", 8), ("2100m", 32)])
def test_auto_is_the_lowest_stage_at_which_enough_fits(preset, ranks):
    chosen = propose(config(preset, *AUTO), ranks, H100)
    assert chosen.fits and chosen.memory.peak <= usable(H100)
    assert chosen.micro * chosen.accumulation * ranks == 320
    for stage in range(1, chosen.config.zero.level):
        lower = best(with_zero(chosen.config, stage=stage), ranks, H100)
        assert not lower.fits or lower.micro < chosen.micro


def test_a_small_model_needs_no_partitioned_weights_and_a_large_one_does():
    assert propose(config("21m", *AUTO), 8, H100).config.zero.stage == 1
    assert propose(config("2100m", *AUTO), 8, 12e9).config.zero.stage == 3


@pytest.mark.parametrize("stage, micro", [(1, 1), (2, 20), (3, 40)])
def test_what_is_asked_for_is_never_changed(stage, micro):
    asked = config("2100m", f"zero.stage={stage}", f"batch.micro={micro}")
    for device in (1e9, H100):
        assert settle(asked, 8, device) == asked
    half = config("830m", f"batch.micro={micro}", "zero.stage=auto")
    assert settle(half, 8, H100).batch.micro == micro


def test_some_memory_is_left_to_libraries_and_holes():
    asked = config("2100m", "batch.micro=8")
    peak = best(asked, 8, H100).memory.peak
    assert not best(asked, 8, 1.01 * peak).fits and best(asked, 8, 1.1 * peak + 2e9).fits


def test_where_nothing_fits_one_line_says_what_would():
    with pytest.raises(UserError, match="8 GPUs of 4 GB are too few.*recompute=full") as refused:
        propose(config("2100m", *AUTO), 8, 4e9)
    assert "\n" not in str(refused.value)


def test_more_memory_or_more_gpus_never_take_a_smaller_micro_batch():
    asked = config("2100m", "batch.micro=auto")
    by_memory = [best(asked, 8, gb * 1e9).micro for gb in (40, 80, 140, 190)]
    assert by_memory == sorted(by_memory) and by_memory[0] < by_memory[-1]
    peaks = [best(config("2100m", "batch.micro=2"), n, H100).memory.peak for n in (2, 8, 32)]
    assert peaks == sorted(peaks, reverse=True)


def test_processors_take_stage_1_and_up_to_sixteen_images():
    settled = settle(config("1m", *AUTO), 2, None)
    assert (settled.zero.stage, settled.batch.micro) == (1, 16)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_sends_nothing(stage):
    keys = (f"zero.stage={stage}", "precision=fp32", "batch.micro=1")
    assert set(communication(best(config("1m", *keys), 1, H100), 1, 1).values()) == {0.0}


def test_copies_within_a_node_spare_the_net_and_not_the_node():
    def sent(hpz):
        keys = ("batch.micro=2", f"zero.hpz={hpz}")
        return communication(best(config("2100m", *keys), 32, H100), 32)

    assert sent("true")["all"] < sent("false")["all"]
    assert sent("true")["node"] > sent("false")["node"] == 0


def test_a_run_takes_less_time_on_more_gpus_and_as_many_gpu_hours():
    one, many = (course(config("2100m"), n, GPUS["h100"], 0.45, price=2.0) for n in (1, 32))
    assert many.hours == pytest.approx(one.hours / 32)
    assert (many.gpu_hours, many.kwh) == pytest.approx((one.gpu_hours, one.kwh))
    assert many.cost == pytest.approx(2 * many.gpu_hours)
    assert course(config("2100m"), 1, GPUS["h100"], 0.45).cost is None
    again = course(config("2100m", "recompute=full"), 1, GPUS["h100"], 0.45)
    assert 1.2 < again.hours / one.hours < 4 / 3 + 0.01


def test_every_gpu_has_a_peak_and_others_are_refused():
    for name, gpu in GPUS.items():
        assert gpu_named(name).peak("bf16") > gpu.peak("fp32") > 0
    with pytest.raises(UserError, match="--gpu v100: one of b200, .* would be right"):
        gpu_named("v100")
