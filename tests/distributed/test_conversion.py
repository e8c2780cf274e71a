"""One saved state is one model folder, whatever stage, number of ranks and layer saved it."""

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from astropt_ds.convert.find import open_source
from astropt_ds.model import AstroPT
from astropt_ds.model_folder.config_json import read_model_config
from astropt_ds.model_folder.weights import DTYPES, StoredWeights
from astropt_ds.tokens import standardise
from astropt_ds.training.fragments import STATES
from tests.distributed import convert_scenarios
from tests.distributed.conversions import (
    CONFIG,
    DEEPSPEEDS,
    MODEL,
    SAVED,
    SHAPES,
    assert_equal,
    converted,
    tensors,
)
from tests.distributed.convert_scenarios import HALVES, STEPS, TAG


@pytest.fixture(scope="module")
def models(conversions, tmp_path_factory):
    """The model folder of the state in each dtype, and the checksums of its files."""
    paths = {dtype: tmp_path_factory.mktemp(dtype) / "model" for dtype in ("fp32", "bf16")}
    return {d: (path, converted(conversions / "origin", path, d)) for d, path in paths.items()}


def test_the_state_is_one_that_training_has_moved(saved_state):
    initial = AstroPT(MODEL, seed=5)
    for name, parameter in initial.named_parameters():
        assert not torch.equal(saved_state[name, "weight"], parameter), name
        assert saved_state[name, "exp_avg"].any() and saved_state[name, "exp_avg_sq"].any(), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("saved", SAVED)
def test_every_stage_on_every_number_of_ranks_makes_the_same_model_folder(
    conversions, models, saved, dtype, tmp_path
):
    _, checksums = models[dtype]
    assert {"config.json", "model.safetensors"} <= checksums.keys()
    assert converted(conversions / "ours" / saved, tmp_path / "model", dtype) == checksums


@pytest.mark.parametrize("saved", DEEPSPEEDS)
def test_what_deepspeed_saved_itself_holds_the_same_weights_and_moments(
    conversions, saved_state, saved
):
    source = open_source(conversions / "deepspeed" / saved, MODEL)
    assert source.dtype == torch.float32 and source.format == "deepspeed"
    if "elastic" in saved:  # whose moments nobody knows
        assert source.optim is None
        return assert_equal(tensors(source, ["weight"]), saved_state)
    assert_equal(tensors(source), saved_state)
    optim = CONFIG.optim.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    assert {**source.optim, "lr": optim["lr"]} == {**optim, "updates": STEPS}


def test_the_tag_itself_may_be_named_and_the_step_is_told(conversions):
    for path in (
        conversions / "deepspeed" / "trained",
        conversions / "deepspeed" / "trained" / TAG,
    ):
        source = open_source(path, MODEL)
        assert source.what == "DeepSpeed checkpoint, ZeRO stage 3, 2 ranks"
        assert source.facts == {"step": STEPS}
    universal = open_source(conversions / "deepspeed" / "2-fp32-1-universal", MODEL)
    assert universal.what == "DeepSpeed checkpoint, universal"


def test_deepspeeds_model_folders_are_alike_byte_for_byte(conversions, tmp_path):
    found = [
        converted(conversions / "deepspeed" / saved, tmp_path / saved, "bf16")
        for saved in ("1-fp32-0", "2-fp32-1", "3-bf16-3", "2-fp32-3-universal")
    ]
    assert all(checksums == found[0] for checksums in found)


def test_moments_that_stage_0_keeps_in_another_order_are_told_apart_or_left(
    conversions, saved_state, copy
):
    path = copy("2-fp32-0")
    file = path / TAG / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    matrices, rest = content["optimizer"]["param_groups"]
    ordered = sorted(SHAPES, key=lambda name: len(SHAPES[name]) < 2)  # as our two groups are
    numbers = [ordered.index(name) for name in SHAPES]
    for groups, known in (
        ([{**matrices, "params": numbers}], True),
        ([{**matrices, "params": matrices["params"][::-1]}, rest], False),
        ([rest, matrices], False),
    ):
        content["optimizer"]["param_groups"] = groups
        torch.save(content, file)
        source = open_source(path, MODEL)
        assert (source.optim is not None) == known
        assert_equal(tensors(source, STATES if known else ["weight"]), saved_state)


@pytest.mark.parametrize("precision", HALVES)
def test_a_stage_0_in_half_precision_is_read_from_its_fp32_masters(conversions, precision):
    source = open_source(conversions / "deepspeed" / f"{precision}-0", MODEL)
    masters = torch.load(conversions / f"{precision}-0.pt")
    assert source.dtype == torch.float32 and source.optim is not None
    weights = tensors(source, ["weight"])
    assert_equal(weights, {(name, "weight"): values for name, values in masters.items()})
    half = DTYPES[precision]
    assert all(not torch.equal(w, w.to(half).float()) for w in weights.values() if w.any())


def test_deepspeeds_loss_scaler_is_passed_over(copy, saved_state):
    path = copy("2-fp32-1")
    for file in (path / TAG).glob("*_optim_states.pt"):
        content = torch.load(file, weights_only=False)
        scaler = DynamicLossScaler(2**16, 2.0, 1000, 1.0, 2, False)
        content["optimizer_state_dict"]["loss_scaler"] = scaler
        torch.save(content, file)
        assert b"DynamicLossScaler" in file.read_bytes()
    assert_equal(tensors(open_source(path, MODEL)), saved_state)


@pytest.mark.parametrize("saved", SAVED)
def test_the_converted_model_predicts_bit_for_bit_what_the_engine_did(conversions, models, saved):
    _, dtype, *_ = saved.split("-")  # what the engine computed in
    output, _ = models[dtype]
    model = AstroPT(read_model_config(output)).to(DTYPES[dtype])
    weights = StoredWeights(output, model.config)
    model.load_state_dict({name: weights.tensor(name) for name in SHAPES})
    batch = convert_scenarios.prediction_batch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the engines had
    with torch.no_grad():
        predictions, _ = model(standardise(batch.patches)[:, :-1])
    torch.set_num_threads(threads)
    assert np.array_equal(predictions.float().numpy(), np.load(conversions / f"{saved}.npy"))
