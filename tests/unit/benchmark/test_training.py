"""The benchmark of a training step, at a size that takes seconds."""

import json

import pytest

from astropt_ds.benchmark.measure import spread
from astropt_ds.benchmark.scaling import measure_scaling
from astropt_ds.benchmark.steps import _check
from astropt_ds.benchmark.training import ENGINES, PLAIN, REFERENCE
from astropt_ds.errors import UserError
from tools.benchmark import main


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("model: {layers: 1, heads: 2, width: 32}\ndata: {image_size: 64}\n")
    return str(path)


@pytest.mark.needs("parity")
def test_all_ways_make_the_same_steps_and_are_told_with_the_machine(small, tmp_path, capsys):
    pytest.importorskip("astropt", reason="astropt 2.0.9 is not installed")
    out = tmp_path / "out.json"
    main(["train", "--config", small, "--rounds", "3", "--against", "astropt", "--json", str(out)])
    found = json.loads(out.read_text())
    assert found["machine"]["cores"] > 0 and found["machine"]["packages"]["torch"]
    result = found["training small.yaml, 16 tokens a step".replace("small.yaml", small)]
    assert set(result["cpu_s_a_step"]) == {PLAIN, REFERENCE, *ENGINES}
    assert all(low <= high for low, high in result["spread"].values())
    for name in ENGINES:  # the rounds' own ratios, in turns
        assert result["over_the_plain_loop"][name] > 0
    assert set(result["reference_over_ours"]) == {n for n in ENGINES if "bf16" not in n}
    assert f"{result['fp32_over_bf16']:,.3f}" in capsys.readouterr().out


def test_ways_that_learn_otherwise_are_refused():
    learnt = [0.5, 0.45, 0.4]
    _check({PLAIN: learnt, "ZeRO-1": [0.5, 0.46, 0.401], "ZeRO-1, bf16": [0.51, 0.46, 0.42]})
    for losses in ([0.5, 0.5, 0.5], [0.5, 0.45, 0.41], [0.5, 0.45, float("nan")]):
        with pytest.raises(UserError, match="the loss of ZeRO-1 fell by"):
            _check({PLAIN: learnt, "ZeRO-1": losses})


def test_a_spread_is_of_the_quartiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == [2.0, 4.0]
    assert spread([1.0]) == [1.0, 1.0]


def test_bad_input_is_told_in_a_line():
    with pytest.raises(UserError, match="no such preset"):
        main(["train", "--config", "21", "--rounds", "1"])
    with pytest.raises(UserError, match="--batch 0: 1 or more"):
        main(["train", "--batch", "0"])


@pytest.mark.slow
def test_ranks_beside_one_tell_where_the_step_goes(small, tmp_path):
    found = measure_scaling(small, 2, 1, tmp_path, "zero.stage=3")
    assert found["speed_up"] > 0 and found["cpu_seconds_ratio"] > 0
    one, two = (found[f"seconds of a step, {ranks} ranks"] for ranks in (1, 2))
    assert two["communication"] > one["communication"]
    assert two["step_s"] >= two["forward"] + two["backward"]
