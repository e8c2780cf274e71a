"""Damaged files are told in a line, or change nothing."""

import os
import random
import shutil
import zipfile

import pytest
import torch

from astropt_ds.convert.find import open_source
from astropt_ds.errors import UserError
from tests.distributed.conversions import MODEL, assert_equal, tensors, told
from tests.distributed.convert_scenarios import STEPS, TAG


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
def test_random_corruptions_of_deepspeeds_files_are_told_or_change_nothing(
    copy, saved_state, saved
):
    path = copy(saved)
    file = next((path / TAG).glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt"))
    lines = check_corruptions(path, file, saved_state, MODEL)
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


def test_random_corruptions_of_a_file_of_ours_are_told(conversions, saved_state, tmp_path):
    path = shutil.copytree(conversions / "ours" / "2-fp32-3", tmp_path / "run")
    file = path / "checkpoints" / f"step-{STEPS:08d}" / "rank-00001.safetensors"
    lines = check_corruptions(path, file, saved_state, None)
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


RANK, HEADER = "zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"
UNKNOWN = "{file}: not laid out as by DeepSpeed 0.19"


@pytest.mark.parametrize(
    "name, key, value, message",
    [
        *((RANK, "optimizer_state_dict", v, UNKNOWN) for v in (3, {}, [], "text", [{"a": 3}])),
        *((HEADER, "param_shapes", v, UNKNOWN) for v in (3, "text", [{"a": 3}])),
        *(
            (HEADER, "param_shapes", v, f"{RANK} has 2 groups of parameters, not 0")
            for v in ({}, [])
        ),
    ],
)
def test_what_is_laid_out_otherwise_is_told(copy, name, key, value, message):
    path = copy("2-fp32-1")
    file = path / TAG / name
    content = torch.load(file, weights_only=False)
    torch.save({**content, key: value}, file)
    assert message.format(file=file) in told(path)
