"""One saved state is one model folder, whatever stage, number of ranks and layer saved it."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from astropt_ds.config import ModelConfig
from astropt_ds.config_source import load_config
from astropt_ds.convert.find import open_source
from astropt_ds.convert.write import write_model_folder
from astropt_ds.convert.zero import is_zero
from astropt_ds.errors import UserError
from astropt_ds.files import sha256_file, write_durably
from astropt_ds.flops import parameters
from astropt_ds.model import AstroPT, parameter_shapes
from astropt_ds.model_folder.config_json import read_model_config
from astropt_ds.model_folder.weights import DTYPES, StoredWeights
from astropt_ds.tokens import standardise
from astropt_ds.training import checkpoint
from astropt_ds.training.fragments import STATES, Fragment
from astropt_ds.training.ranks import ALONE
from astropt_ds.training.staging import merge, write_fragments
from tests.conftest import REPOSITORY
from tests.distributed import convert_scenarios
from tests.distributed.convert_scenarios import ENGINES, STEPS, TAG, UNIVERSAL, VARIANTS
from tests.distributed.scenarios import configuration

RANKS = (2, 1, 3)  # two ranks first: they train what all save
SAVED = [f"{ranks}-{precision}-{stage}" for ranks in RANKS for precision, stage in ENGINES]
DEEPSPEEDS = [
    *("trained", *SAVED),
    *(f"{ranks}-{variant}" for ranks in RANKS for variant in VARIANTS),
    *(f"2-{name}-universal" for name in UNIVERSAL),
]
CONFIG = configuration("3", 12)
MODEL = CONFIG.model
SHAPES = parameter_shapes(MODEL)


@pytest.fixture(scope="module")
def folder(launch, tmp_path_factory):
    """What all of them saved. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("conversion")
    for ranks in RANKS:
        done = launch(ranks, convert_scenarios.__file__, folder, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def tensors(source, states=STATES):
    return {(name, state): source.tensor(name, state) for name in SHAPES for state in states}


@pytest.fixture(scope="module")
def state(folder):
    """The weights and moments that all of them hold."""
    return tensors(open_source(folder / "origin"))


def assert_equal(found, expected):
    assert found.keys() <= expected.keys()
    for key, values in found.items():
        assert values.dtype == expected[key].dtype, key
        assert torch.equal(values, expected[key]), key


def converted(folder, output, dtype):
    model = MODEL if "deepspeed" in folder.parts else None
    write_model_folder(open_source(folder, model), output, DTYPES[dtype])
    return {path.name: sha256_file(path) for path in output.iterdir()}


@pytest.fixture(scope="module")
def models(folder, tmp_path_factory):
    """The model folder of the state in each dtype, and the checksums of its files."""
    paths = {dtype: tmp_path_factory.mktemp(dtype) / "model" for dtype in ("fp32", "bf16")}
    return {d: (path, converted(folder / "origin", path, d)) for d, path in paths.items()}


# ---- one state, however it was saved ---------------------------------------------------------


def test_the_state_is_one_that_training_has_moved(state):
    initial = AstroPT(MODEL, seed=5)
    for name, parameter in initial.named_parameters():
        assert not torch.equal(state[name, "weight"], parameter), name
        assert state[name, "exp_avg"].any() and state[name, "exp_avg_sq"].any(), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("saved", SAVED)
def test_every_stage_on_every_number_of_ranks_makes_the_same_model_folder(
    folder, models, saved, dtype, tmp_path
):
    _, checksums = models[dtype]
    assert {"config.json", "model.safetensors"} <= checksums.keys()
    assert converted(folder / "ours" / saved, tmp_path / "model", dtype) == checksums


@pytest.mark.parametrize("saved", DEEPSPEEDS)
def test_what_deepspeed_saved_itself_holds_the_same_weights_and_moments(folder, state, saved):
    source = open_source(folder / "deepspeed" / saved, MODEL)
    assert source.dtype == torch.float32 and source.format == "deepspeed"
    if "elastic" in saved:  # whose moments nobody knows
        assert source.optim is None
        return assert_equal(tensors(source, ["weight"]), state)
    assert_equal(tensors(source), state)
    optim = CONFIG.optim.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    assert {**source.optim, "lr": optim["lr"]} == {**optim, "updates": STEPS}


def test_the_tag_itself_may_be_named_and_the_step_is_told(folder):
    for path in (folder / "deepspeed" / "trained", folder / "deepspeed" / "trained" / TAG):
        source = open_source(path, MODEL)
        assert source.what == "DeepSpeed checkpoint, ZeRO stage 3, 2 ranks"
        assert source.facts == {"step": STEPS}
    universal = open_source(folder / "deepspeed" / "2-fp32-1-universal", MODEL)
    assert universal.what == "DeepSpeed checkpoint, universal"


def test_deepspeeds_model_folders_are_alike_byte_for_byte(folder, tmp_path):
    found = [
        converted(folder / "deepspeed" / saved, tmp_path / saved, "bf16")
        for saved in ("1-fp32-0", "2-fp32-1", "3-bf16-3", "2-fp32-3-universal")
    ]
    assert all(checksums == found[0] for checksums in found)


def test_moments_that_stage_0_keeps_in_another_order_are_told_apart_or_left(folder, state, copy):
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
        assert_equal(tensors(source, STATES if known else ["weight"]), state)


@pytest.mark.parametrize("saved", SAVED)
def test_the_converted_model_predicts_bit_for_bit_what_the_engine_did(folder, models, saved):
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
    assert np.array_equal(predictions.float().numpy(), np.load(folder / f"{saved}.npy"))


# ---- what cannot be converted ----------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    """Copies of checkpoints of DeepSpeed's own."""

    def copy(saved):
        return shutil.copytree(folder / "deepspeed" / saved, tmp_path / saved)

    return copy


def told(path, model=MODEL):
    with pytest.raises(UserError) as caught:
        tensors(open_source(path, model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_model_the_line_says_how_to_tell_it_and_what_the_shapes_suggest(folder):
    line = told(folder / "deepspeed" / "2-fp32-1", None)
    assert "--config PRESET_OR_YAML" in line and "2 layers of width 33" in line


def test_a_model_that_does_not_fit_is_told_with_all_differences(folder):
    other = ModelConfig.model_validate(
        {**MODEL.architecture(), "layers": 3, "block_size": 20, "tokeniser": "aim"}
    )
    for saved in ("2-fp32-0", "2-fp32-1", "3-bf16-3", "2-fp32-3-universal"):
        line = told(folder / "deepspeed" / saved, other)
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
        assert f"{name % 2} of 3 ranks is missing" in line
        assert f"{name % 0}: damaged, or no file that torch.save wrote" in line
        assert "missing: transformer.h.2" in line


def test_files_of_two_checkpoints_make_none(copy, folder):
    path = copy("2-fp32-3")
    name = "zero_pp_rank_%d_mp_rank_00_optim_states.pt"
    shutil.copy(folder / "deepspeed" / "3-fp32-3" / TAG / (name % 1), path / TAG)
    assert f"{name % 1} is of another checkpoint than {name % 0}" in told(path)
    shutil.copy(folder / "deepspeed" / "2-subgroups" / TAG / (name % 1), path / TAG)
    assert f"{name % 1} is of another checkpoint than {name % 0}" in told(path)
    shutil.copy(folder / "deepspeed" / "2-fp32-3" / TAG / (name % 1), path / TAG)
    shutil.copy(folder / "deepspeed" / "3-fp32-3" / TAG / (name % 2), path / TAG)
    assert f"{name % 2} is there of 2 ranks only" in told(path)
    shutil.copy(path / TAG / (name % 2), path / TAG / f"bf16_{name % 2}")
    assert "a second file of its rank" in told(path)
    path = copy("3-fp32-1")
    shutil.copy(folder / "deepspeed" / "3-aligned" / TAG / (name % 1), path / TAG)
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


def test_our_own_folders_are_not_mistaken_for_deepspeeds(folder):
    ours = folder / "ours" / "2-fp32-3"
    assert (ours / "latest").is_file()
    assert not is_zero(ours) and not is_zero(ours / "checkpoints" / f"step-{STEPS:08d}")
    with pytest.raises(UserError, match="tells its own model"):
        open_source(ours, MODEL)


# ---- damage ----------------------------------------------------------------------------------


def check_corruptions(path, file, state, model):
    """Whatever happens to a file, its weights are the right ones or the damage is told."""
    data = file.read_bytes()
    rng = random.Random(0)
    lines = []
    for case in range(32):
        harmed = bytearray(data)
        start, length = rng.randrange(len(data)), rng.choice((1, 4, 64))
        if case % 4 == 0:  # in what the zip archive, or the header, tells
            start = rng.choice((rng.randrange(2000), len(data) - 1 - rng.randrange(2000)))
        for at in range(start, min(start + length, len(data))):
            harmed[at] ^= rng.randrange(1, 256)
        if case % 8 == 7:
            del harmed[start:]
        file.write_bytes(harmed)
        try:
            assert_equal(tensors(open_source(path, model)), state)
        except UserError as error:
            assert "\n" not in str(error)
            lines.append(str(error))
    file.write_bytes(data)
    assert_equal(tensors(open_source(path, model)), state)
    return lines


@pytest.mark.parametrize("saved", ["2-fp32-1", "2-bf16-3"])
def test_random_corruptions_of_deepspeeds_files_are_told_or_change_nothing(copy, state, saved):
    path = copy(saved)
    file = next((path / TAG).glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt"))
    lines = check_corruptions(path, file, state, MODEL)
    assert len(lines) >= 24 and all(file.name in line for line in lines)


def rewrite_pickle(file, change):
    """A file of torch.save with another pickle, whose checksum is right."""
    with zipfile.ZipFile(file) as archive:
        records = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for info, data in records.items():
            altered = change(data) if info.filename.endswith("/data.pkl") else data
            archive.writestr(info.filename, altered)


@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"]
)
def test_a_pickle_altered_together_with_its_checksum_ends_in_a_line_if_in_anything(copy, name):
    path = copy("2-fp32-1")
    data = (path / TAG / name).read_bytes()
    rng = random.Random(0)

    def alter(text):
        altered = bytearray(text)
        altered[rng.randrange(len(text))] = rng.randrange(256)
        return bytes(altered)

    lines = set()
    for _ in range(60):
        (path / TAG / name).write_bytes(data)
        rewrite_pickle(path / TAG / name, alter)
        try:
            tensors(open_source(path, MODEL))
        except UserError as error:
            lines.add(str(error))
    assert len(lines) > 20 and not any("\n" in line for line in lines)


def test_a_name_with_a_line_break_stays_in_the_line(copy):
    path = copy("2-fp32-0")
    file = path / TAG / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    content["module"]["a\nb"] = torch.zeros(3)
    torch.save(content, file)
    assert "not of this model: a b" in told(path)


def test_a_pickle_that_asks_for_memory_beyond_its_size_is_refused(copy):
    path = copy("2-fp32-1")
    large = b"\x80\x02}r" + (10_000_000).to_bytes(4, "little") + b"."
    rewrite_pickle(path / TAG / "mp_rank_00_model_states.pt", lambda text: large)
    assert "memo 10000000 in 9 bytes" in told(path)


def test_random_corruptions_of_a_file_of_ours_are_told(folder, state, tmp_path):
    path = shutil.copytree(folder / "ours" / "2-fp32-3", tmp_path / "run")
    file = path / "checkpoints" / f"step-{STEPS:08d}" / "rank-00001.safetensors"
    lines = check_corruptions(path, file, state, None)
    assert len(lines) == 32 and all(file.name in line for line in lines)


class Command:
    """What a pickle may ask for."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["optimizer", "model", "universal"])
def test_a_pickle_that_would_run_a_command_is_refused_by_name_and_does_not(copy, tmp_path, place):
    path = copy("2-fp32-1-universal" if place == "universal" else "2-fp32-1")
    file = {
        "optimizer": path / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "model": path / TAG / "mp_rank_00_model_states.pt",
        "universal": path / TAG / "zero" / "transformer.ln_f.weight" / "fp32.pt",
    }[place]
    content = torch.load(file, weights_only=False)
    torch.save({**content, "more": Command(tmp_path / "touched")}, file)
    line = told(path)
    assert f"{file}: refused: its pickle asks for posix.system" in line
    assert not (tmp_path / "touched").exists()
    torch.load(file, weights_only=False)  # the command is a real one
    assert (tmp_path / "touched").exists()


def test_what_is_laid_out_otherwise_is_told(copy):
    path = copy("2-fp32-1")
    for file, key in (
        (path / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt", "optimizer_state_dict"),
        (path / TAG / "mp_rank_00_model_states.pt", "param_shapes"),
    ):
        data = file.read_bytes()
        for value in (3, {}, [], "text", [{"a": 3}]):
            content = torch.load(file, weights_only=False)
            torch.save({**content, key: value}, file)
            assert "DeepSpeed 0.19" in told(path) or "missing" in told(path)
        file.write_bytes(data)


# ---- size ------------------------------------------------------------------------------------

OVERRIDES = ("model.layers=6", "model.heads=8", "model.width=768")
LARGE = load_config("1m", OVERRIDES)
LARGE_RANKS = 4
MEASURE = """
import sys
from pathlib import Path
from astropt_ds.config_source import load_config
from astropt_ds.convert.find import open_source
from astropt_ds.convert.write import write_model_folder
path, output, *overrides = sys.argv[1:]
model = load_config("1m", overrides).model if overrides else None
def peak():  # resource's begins with what the parent process had
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
idle = peak()
write_model_folder(open_source(Path(path), model), Path(output))
print(peak() - idle)
"""


def share(shape, rank):
    """Start and length of what ZeRO-3 gives a rank of a tensor, padding included."""
    count = int(np.prod(shape))
    length = -(-count // LARGE_RANKS)
    return rank * length, min(length, count - rank * length)


def large_run(path):
    """A checkpoint of ours as four ranks write it under ZeRO-3."""
    final = path / "checkpoints" / "step-00000001"
    final.mkdir(parents=True)
    parts = []
    for rank in range(LARGE_RANKS):
        generator = torch.Generator().manual_seed(rank)
        fragments = []
        for name, shape in parameter_shapes(LARGE.model).items():
            start, length = share(shape, rank)
            for state in STATES if length > 0 else ():
                values = torch.rand(length, generator=generator)
                fragments.append(Fragment(name, state, shape, start, values, True))
        parts += write_fragments(final, fragments, replace(ALONE, rank=rank))
    manifest = {
        "format": checkpoint.FORMAT,
        "step": 1,
        "state": {"config": LARGE.model_dump(mode="json"), "facts": {}, "engine": {"updates": 1}},
        "files": {part["file"]: part["facts"] for part in parts},
        "tensors": merge(parts),
    }
    write_durably(final / "manifest.json", json.dumps(manifest))
    write_durably(final / "complete", sha256_file(final / "manifest.json") + "\n")


def large_deepspeed(path):
    """The same sizes as DeepSpeed writes them."""
    path.mkdir()
    shapes = parameter_shapes(LARGE.model)
    common = {"buffer_names": [], "global_steps": 1, "frozen_param_shapes": None}
    header = {**common, "module": {}, "optimizer": None, "param_shapes": [shapes]}
    torch.save(header, path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in range(LARGE_RANKS):
        generator = torch.Generator().manual_seed(rank)
        values = torch.rand(sum(share(s, 0)[1] for s in shapes.values()), generator=generator)
        state = {
            "partition_count": LARGE_RANKS,
            "fp32_flat_groups": [values],
            "optimizer_state_dict": {"state": {}, "param_groups": []},
        }
        file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, path / file)


@pytest.mark.parametrize("make", [large_run, large_deepspeed])
def test_converting_takes_the_memory_of_a_few_tensors(tmp_path, make):
    make(path := tmp_path / "saved")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    weights = 4 * parameters(LARGE.model)
    assert size >= weights * (len(STATES) if make is large_run else 1)
    arguments = (path, tmp_path / "model", *(OVERRIDES if make is large_deepspeed else ()))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    largest = max(4 * int(np.prod(s)) for s in parameter_shapes(LARGE.model).values())
    assert int(done.stdout) < 6 * largest < weights / 3
