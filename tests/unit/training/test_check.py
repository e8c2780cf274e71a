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
