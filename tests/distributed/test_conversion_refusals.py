"""Checkpoints of DeepSpeed's that cannot be converted are told in a line."""

import json
import math
import re
import shutil

import pytest
import torch

from astropt_ds.config import ModelConfig
from astropt_ds.convert.find import open_source
from astropt_ds.convert.zero import is_zero
from astropt_ds.errors import UserError
from tests.distributed.conversions import MODEL, SHAPES, told
from tests.distributed.convert_scenarios import HALVES, STEPS, TAG


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
    content = torch.load(path / TAG / (name % 2), weights_only=False)
    torch.save(content, path / TAG / f"bf16_{name % 2}")
    assert "a second file of its rank" in told(path)
    path = copy("3-fp32-1")
    shutil.copy(conversions / "deepspeed" / "3-aligned" / TAG / (name % 1), path / TAG)
    assert f"{name % 1}: weight of group 0 is" in told(path)


def test_a_rank_s_file_in_another_s_place_is_told(copy):
    path = copy("2-fp32-1")
    name = "zero_pp_rank_%d_mp_rank_00_optim_states.pt"
    shutil.copy(path / TAG / (name % 0), path / TAG / (name % 1))
    assert f"{name % 1}: was saved as {name % 0}; copied over another?" in told(path)


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


RANK = "zero_pp_rank_%d_mp_rank_00_optim_states.pt"
HEADER = "mp_rank_00_model_states.pt"


def alter(file, change):
    """What was saved, changed in place by ``change``."""
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


@pytest.mark.parametrize("stage", ["1", "3"])
def test_files_of_ranks_that_were_saved_at_different_steps_are_told(copy, stage):
    path = copy(f"3-fp32-{stage}")

    def later(content):
        state = content["optimizer_state_dict"]
        adamw = state["optimizer_state_dict" if stage == "3" else "base_optimizer_state"]
        for entry in adamw["state"].values():
            entry["step"] += 4

    alter(path / TAG / (RANK % 1), later)
    (path / TAG / (RANK % 2)).write_bytes(b"x")
    line = told(path)
    assert f"updates is 5 in {RANK % 0}; 9 in {RANK % 1}: they were not saved together" in line
    assert f"{RANK % 2}: damaged" in line


def test_a_rank_that_counts_differently_within_its_file_is_told(copy):
    path = copy("2-fp32-1")

    def later(content):
        content["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["step"] = 9

    alter(path / TAG / (RANK % 1), later)
    assert f"5 in {RANK % 0}, {RANK % 1}; 9 in {RANK % 1}" in told(path)


def test_models_files_of_different_steps_are_told(copy):
    path, name = copy("2-fp32-3"), "zero_pp_rank_%d_mp_rank_00_model_states.pt"
    alter(path / TAG / (name % 1), lambda content: content.update(global_steps=9))
    assert f"DeepSpeed's count of updates is 0 in {name % 0}; 9 in {name % 1}" in told(path)


@pytest.mark.parametrize("precision", HALVES)
def test_an_optimizer_of_stage_0_that_is_not_known_is_refused(copy, precision):
    path = copy(f"{precision}-0")
    file = path / TAG / HEADER
    alter(file, lambda content: content["optimizer"].update(more={}))
    assert f"{file}: the optimizer's state has more, which are not read" in told(path)

    def flatten(content):  # as deepspeed's FP16_Optimizer does
        optimizer = content["optimizer"]
        del optimizer["more"]
        optimizer["fp32_groups_flat"] = optimizer.pop("fp32_groups")

    alter(file, flatten)
    assert "fp32_groups_flat" in told(path) and "which are not read" in told(path)


def test_masters_that_are_not_those_of_the_module_are_refused(copy):
    path = copy("bf16-0")
    file = path / TAG / HEADER

    def swap(content):
        matrices, _ = content["optimizer"]["fp32_groups"]
        first = matrices[0].shape
        assert sum(m.shape == first for m in matrices) == 1
        same = [i for i, m in enumerate(matrices) if m.shape == matrices[3].shape]
        matrices[same[0]], matrices[same[1]] = matrices[same[1]], matrices[same[0]]

    alter(file, swap)
    assert f"{file}: the fp32 master of " in told(path)
    alter(file, lambda content: content["optimizer"]["fp32_groups"].reverse())
    assert f"{file}: fp32_groups are not in a known order" in told(path)


@pytest.mark.parametrize("value", [0, -1, 10**9, 2.5, float("nan"), float("inf"), "2", [], None])
def test_a_number_of_ranks_that_cannot_be_is_told(copy, value):
    path = copy("2-fp32-3")
    file = path / TAG / (RANK % 0)
    alter(file, lambda content: content["optimizer_state_dict"].update(partition_count=value))
    line = told(path)
    assert f"{file}: not laid out as by DeepSpeed 0.19" in line and len(line) < 2000


def test_many_missing_files_are_counted(copy):
    path = copy("2-fp32-3")
    for rank in (0, 1):
        change = {"partition_count": 60_000}
        alter(path / TAG / (RANK % rank), lambda c: c["optimizer_state_dict"].update(change))  # noqa: B023
    line = told(path)
    assert f"missing of 60000 ranks: {RANK % 2}, " in line and "and 59990 more" in line
    assert len(line) < 2000


@pytest.mark.parametrize("saved", ["2-fp32-0", "2-fp32-1", "2-fp32-3", "2-fp32-1-universal"])
@pytest.mark.parametrize("value", [torch.zeros(2), -1, 10**30, float("inf"), "5", None])
def test_a_step_that_cannot_be_is_told(copy, saved, value):
    path = copy(saved)
    file = next((path / TAG).glob("*model_states.pt"))
    alter(file, lambda content: content.update(global_steps=value))
    assert f"{file}: not laid out as by DeepSpeed 0.19" in told(path)


def test_a_step_of_one_element_is_a_number(copy):
    path = copy("2-fp32-1")
    alter(path / TAG / HEADER, lambda content: content.update(global_steps=torch.tensor(5)))
    assert json.dumps(open_source(path, MODEL).facts) == '{"step": 5}'


def test_a_tensor_that_the_parts_do_not_fill_is_told(copy):
    path = copy("2-fp32-1")

    def shift(content):  # the second parameter begins before the first one's file
        shapes = content["param_shapes"][0]
        first = math.prod(next(iter(shapes.values())))
        paddings[:] = [[0] * len(s) for s in content["param_shapes"]]
        paddings[0][0], paddings[0][-1] = -(first + 5), first + 5

    paddings = []
    alter(path / TAG / HEADER, shift)
    change = {"param_alignment_paddings": paddings}
    alter(path / TAG / (RANK % 0), lambda content: content["optimizer_state_dict"].update(change))
    assert re.search(rf"{path / TAG}: weight of \S+ has (\d+) of (\d+) elements", told(path))


def test_names_with_and_without_a_compilers_prefix_are_told_with_the_folder(copy):
    path = copy("2-fp32-0")
    name = next(iter(SHAPES))

    def twice(content):
        content["module"][f"_orig_mod.{name}"] = content["module"][name]

    alter(path / TAG / HEADER, twice)
    assert f"{path / TAG}: with _orig_mod. and without, thus twice: {name}" in told(path)


def test_a_name_that_is_no_text_is_told(copy):
    path = copy("2-fp32-0")
    alter(path / TAG / HEADER, lambda content: content.update(module={3: torch.zeros(3)}))
    assert f"{path / TAG}: not laid out as by DeepSpeed 0.19" in told(path)
