import pytest

from astropt_ds.config_source import load_config
from astropt_ds.flops import parameters
from astropt_ds.memory import state_bytes


@pytest.mark.parametrize(
    "stage, offload, each",
    [
        (1, "false", 2 + 2 + 12 / 8),
        (2, "false", 2 + 2 / 8 + 12 / 8),
        (3, "false", 16 / 8),
        (3, "true", 2 / 8),
    ],
)
def test_each_stage_of_zero_splits_more_of_the_sixteen_bytes_a_parameter(stage, offload, each):
    config = load_config("2100m", [f"zero.stage={stage}", f"zero.offload={offload}"])
    assert state_bytes(config, 8) == round(parameters(config.model) * each)
    assert state_bytes(config, 1) == round(
        parameters(config.model) * (2 if offload == "true" else 16)
    )
