"""Checkpoints of DeepSpeed's that cannot be converted are told in a line."""

import shutil

import pytest
import torch

from astropt_ds.config import ModelConfig
from astropt_ds.convert.find import open_source
from astropt_ds.convert.zero import is_zero
from astropt_ds.errors import UserError
from tests.distributed.conversions import MODEL, told
from tests.distributed.convert_scenarios import STEPS, TAG


def test_without_a_model_the_line_says_how_to_tell_it_and_what_the_shapes_suggest(conversions):
    line = told(conversions / "deepspeed" / "2-fp32-1", None)
    assert "--config PRESET_OR_YAML" in line and "2 layers of width 33" in line


def test_a_model_that_does_not_fit_is_told_with_all_differences(conversions):
    other = ModelConfig.model_validate(
        {**MODEL.architecture(), "layers": 3, "block_size": 20, "tokeniser": "aim"}
    )
    for saved in ("2-fp32-0", "2-fp32-1", "3-bf16-3", "2-fp32-3-universal"):
        line = told(conversions / "deepspeed" / saved, other)
        for difference in (
            "transformer.h.2.ln_1.weight",
            "not of this model: ",
            "encoders.images.0.weight",
            "embedders.images.wpe.weight [17, 33] for [20, 33]",
        ):
            assert difference in line


def test_a_missing_file_of_a_rank_is_named_among_all_that_is_wrong(copy):
    for saved, prefix in (("3-fp32-1", ""), ("3-bf16-3", "bf16_")):
        name = f"{prefix}zero_pp_rank_%d_mp_rank_00_optim_states.pt"
        path = copy(saved)
        (path / TAG / (name % 2)).unlink()
        (path / TAG / (name % 0)).write_bytes(b"x")
        line = told(path, ModelConfig.model_validate({**MODEL.architecture(), "layers": 3}))
        assert f"missing of 3 ranks: {name % 2}" in line
        assert f"{name % 0}: damaged, or no file that torch.save wrote" in line
        assert "missing: transformer.h.2" in line


def test_files_of_two_checkpoints_make_none(copy, conversions):
    path = copy("2-fp32-3")
    name = "zero_pp_rank_%d_mp_rank_00_optim_states.pt"
    shutil.copy(conversions / "deepspeed" / "3-fp32-3" / TAG / (name % 1), path / TAG)
    assert f"{name % 1} is of another checkpoint than {name % 0}" in told(path)
    shutil.copy(conversions / "deepspeed" / "2-subgroups" / TAG / (name % 1), path / TAG)
    assert f"{name % 1} is of another checkpoint than {name % 0}" in told(path)
    shutil.copy(conversions / "deepspeed" / "2-fp32-3" / TAG / (name % 1), path / TAG)
    shutil.copy(conversions / "deepspeed" / "3-fp32-3" / TAG / (name % 2), path / TAG)
    assert f"{name % 2} is there of 2 ranks only" in told(path)
    shutil.copy(path / TAG / (name % 2), path / TAG / f"bf16_{name % 2}")
    assert "a second file of its rank" in told(path)
    path = copy("3-fp32-1")
    shutil.copy(conversions / "deepspeed" / "3-aligned" / TAG / (name % 1), path / TAG)
    assert f"{name % 1}: weight of group 0 is" in told(path)


def test_kinds_that_are_not_read_are_refused(copy):
    path = copy("2-fp32-1") / TAG
    header, optimizer = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path / header, weights_only=False)
    torch.save({**content, "frozen_param_shapes": {"some.weight": (3,)}}, path / header)
    assert "parameters were frozen, which is not read: some.weight" in told(path)
    torch.save(content, path / header)
    (path / (parallel := optimizer.replace("mp_rank_00", "mp_rank_01"))).touch()
    assert f"{parallel} is of a tensor-parallel model" in told(path)
    (path / parallel).unlink()
    (path / "expp_rank_0_mp_rank_00_optim_states.pt").touch()
    assert "expp_rank_0_mp_rank_00_optim_states.pt: a second file of its rank, or of" in told(path)
    for file in path.glob("*_optim_states.pt"):
        file.unlink()
    assert "*_optim_states.pt, which hold the weights, are missing" in told(path)
    shutil.copy(path / header, path / f"zero_pp_rank_0_{header}")
    assert f"found {header}, zero_pp_rank_0_{header}" in told(path)


def test_a_missing_file_of_a_universal_checkpoint_is_named(copy):
    path = copy("2-fp32-1-universal")
    (path / TAG / "zero" / "transformer.ln_f.weight" / "fp32.pt").unlink()
    (path / TAG / "zero" / "encoders.images.0.bias" / "exp_avg.pt").unlink()
    line = told(path)
    assert "missing: transformer.ln_f.weight" in line
    assert "missing: encoders.images.0.bias/exp_avg.pt" in line


@pytest.mark.parametrize(
    "pointer, message",
    [
        ("", "latest: names '', which is no checkpoint of DeepSpeed's; {path}/some-tag"),
        ("nowhere", "latest: names 'nowhere', which is no checkpoint of DeepSpeed's; {path}/some"),
        ("\0\udcff", "latest: names '"),
        (None, "{path}: a checkpoint, but no file latest that names one; {path}/some-tag"),
    ],
)
def test_a_pointer_that_names_nothing_is_told_with_what_is_there(copy, pointer, message):
    path = copy("2-fp32-1")
    (path / "latest").unlink()
    if pointer is not None:
        (path / "latest").write_bytes(pointer.encode(errors="surrogateescape"))
    assert message.format(path=path) in told(path)
    (path / TAG).rename(path / "another-tag")
    shutil.copytree(path / "another-tag", path / "one-more")
    line = told(path)
    assert f"{path}/another-tag or {path}/one-more" in line
    if pointer is None:
        assert "several checkpoints, but no file latest" in line
    for tag in path.glob("*-*"):
        shutil.rmtree(tag)
    assert "none is there" in told(path)


def test_our_own_folders_are_not_mistaken_for_deepspeeds(conversions):
    ours = conversions / "ours" / "2-fp32-3"
    assert (ours / "latest").is_file()
    assert not is_zero(ours) and not is_zero(ours / "checkpoints" / f"step-{STEPS:08d}")
    with pytest.raises(UserError, match="tells its own model"):
        open_source(ours, MODEL)
