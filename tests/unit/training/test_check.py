import pytest

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.training.check import check_run
from tests.conftest import TINY


@pytest.fixture
def config(shards, tmp_path):
    def config(*overrides):
        where = (f"data.path={shards}", f"run.dir={tmp_path / 'run'}")
        return load_config("1m", [*TINY, *where, *overrides])

    return config


def test_a_run_that_can_be_is_described_and_nothing_is_written(config, tmp_path):
    lines = "\n".join(check_run(config(), 2))
    assert "12 images = 2 ranks x 6 x 1 accumulation" in lines and "is new" in lines
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, ranks, gpu_gb, words",
    [
        ((), 5, None, "no multiple of 5 ranks"),
        (("data.path=nowhere",), 2, None, "nowhere"),
        (("data.image_size=128",), 2, None, "128"),
        (("run.dir=/etc/hostname/run",), 2, None, "no folder can be made or written in /etc/host"),
        (("run.dir=null",), 2, None, "run.dir is missing"),
        (("model.width=2560", "model.layers=26", "zero.stage=3"), 2, 10, "2 GPUs of 10 GB are too"),
    ],
)
def test_one_that_could_not_begin_is_refused(config, overrides, ranks, gpu_gb, words):
    with pytest.raises(UserError, match=words):
        list(check_run(config(*overrides), ranks, gpu_gb))


def test_what_may_not_fit_is_warned_of_and_auto_is_settled_instead(config):
    large = ("model.width=1024", "model.layers=24", "zero.stage=1")
    asked = "\n".join(check_run(config(*large, "batch.micro=12"), 1, 7.5))
    assert "warning: zero.stage=1 batch.micro=12 may not fit 1 GPUs of 7.5 GB" in asked
    settled = "\n".join(check_run(config("zero.stage=auto", "batch.micro=auto"), 1, 80))
    assert "1 ranks x 12 x 1 accumulation; the plan for each under ZeRO-1" in settled
    assert "warning" not in settled
