import json

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from astropt_ds.config import ZeroConfig
from astropt_ds.zero import DS_CONFIGS, zero_settings

WAYS = [
    *({"stage": stage} for stage in (0, 1, 2, 3)),
    *({"stage": 3, key: True} for key in ("offload", "hpz")),
]


def test_every_file_is_what_some_way_of_partitioning_reads():
    read = [zero_settings(ZeroConfig(**way), gpu) for way in WAYS for gpu in (True, False)]
    names = {path.name for path in DS_CONFIGS.glob("*.json")}
    assert len(names) == 9
    assert all(json.loads((DS_CONFIGS / name).read_text()) in read for name in names)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_deepspeed_knows_every_key(way, gpu):
    settings = zero_settings(ZeroConfig(**way), gpu)["zero_optimization"]
    assert DeepSpeedZeroConfig(**settings).stage == way["stage"] == settings["stage"]
    known = {f.alias or name for name, f in DeepSpeedZeroConfig.model_fields.items()}
    assert set(settings) <= known | set(DeepSpeedZeroConfig.model_fields)


def test_what_is_read_may_be_changed_without_changing_it():
    zero_settings(ZeroConfig(stage=3), True)["zero_optimization"]["stage"] = 0
    assert zero_settings(ZeroConfig(stage=3), True)["zero_optimization"]["stage"] == 3
