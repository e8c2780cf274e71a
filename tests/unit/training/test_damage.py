"""Whatever happens to checkpoints on the disk, a run never starts from a wrong state."""

import shutil

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.training import checkpoint
from astropt_ds.training.fragments import STATES, Fragment
from astropt_ds.training.ranks import start
from astropt_ds.training.resume import Start, find_start

FILES = ("rank-00000.safetensors", "manifest.json", "complete")
CONFIG = load_config("1m")


@pytest.fixture(scope="module")
def ranks():
    with start() as ranks:
        yield ranks


def fragments():
    return [Fragment("weight", state, (5, 7), 0, torch.arange(35.0), True) for state in STATES]


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory):
    """A run with checkpoints at steps 3 and 6. Not to be changed: copy it."""
    run = tmp_path_factory.mktemp("damage") / "run"
    for step in (3, 6):
        checkpoint.save(run, step, fragments(), {"origin": None}, ranks)
    return run


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def paths(run):
    return [run / "checkpoints" / name for name in ("step-00000003", "step-00000006")]


class Damaged:
    """A file of a checkpoint with something done to it, in a block."""

    def __init__(self, path, harm):
        self.path, self.harm = path, harm

    def __enter__(self):
        self.data = self.path.read_bytes()
        self.harm(self.path, self.data)

    def __exit__(self, *_):
        self.path.write_bytes(self.data)


def check_passed_over(run, ranks):
    older, newest = paths(run)
    start = find_start(CONFIG, run, ranks)
    assert start.path == older
    ((path, reason),) = start.passed_over
    assert path == newest and reason


def flipped(data, place, bit):
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_anywhere_in_the_newest_falls_back_to_the_one_before(ranks, whole, file):
    newest = paths(whole)[1] / file

    @given(place=st.integers(0, newest.stat().st_size - 1), bit=st.integers(0, 7))
    @example(place=0, bit=0)
    @example(place=-1, bit=0)
    def check(place, bit):
        with Damaged(newest, lambda path, data: path.write_bytes(flipped(data, place, bit))):
            check_passed_over(whole, ranks)

    check()
    assert find_start(CONFIG, whole, ranks) == Start(newest.parent, None, [])


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_off_anywhere_or_too_long_falls_back_to_the_one_before(ranks, whole, file):
    newest = paths(whole)[1] / file
    size = newest.stat().st_size

    @given(length=st.integers(0, size - 1))
    @example(length=0)
    @example(length=size - 1)
    def check(length):
        with Damaged(newest, lambda path, data: path.write_bytes(data[:length])):
            check_passed_over(whole, ranks)

    check()
    with Damaged(newest, lambda path, data: path.write_bytes(data + b"\0")):
        check_passed_over(whole, ranks)
    # as a crash leaves what was not yet on the disk: the right length, and zeros
    with Damaged(newest, lambda path, data: path.write_bytes(bytes(size))):
        check_passed_over(whole, ranks)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_falls_back_to_the_one_before(ranks, whole, file):
    with Damaged(paths(whole)[1] / file, lambda path, data: path.unlink()):
        check_passed_over(whole, ranks)


def test_an_empty_folder_or_a_file_in_its_place_falls_back_to_the_one_before(ranks, run):
    shutil.rmtree(paths(run)[1])
    paths(run)[1].mkdir()
    check_passed_over(run, ranks)
    paths(run)[1].rmdir()
    paths(run)[1].write_text("")
    check_passed_over(run, ranks)


def test_files_of_two_checkpoints_make_none(ranks, run):
    older, newest = paths(run)
    shutil.copy(older / "manifest.json", newest / "manifest.json")
    check_passed_over(run, ranks)


def test_where_all_are_damaged_the_run_is_refused_and_each_is_named(ranks, run):
    (paths(run)[0] / FILES[0]).unlink()
    (paths(run)[1] / FILES[1]).write_text("")
    with pytest.raises(UserError) as error:
        find_start(CONFIG, run, ranks)
    message = str(error.value)
    assert message.startswith(f"run.resume=auto: no checkpoint verifies in {run}; ")
    assert f"{paths(run)[0]}: {FILES[0]} is missing" in message
    assert f"{paths(run)[1]}: {paths(run)[1] / FILES[1]} does not match" in message
    assert "\n" not in message


@pytest.mark.parametrize("pointer", ["", "step-00000003\n", "step-00000009\n", "\0\xff", None])
def test_a_pointer_that_is_wrong_empty_or_missing_does_not_mislead(ranks, run, pointer):
    (run / "latest").unlink()
    if pointer is not None:
        (run / "latest").write_text(pointer)
    assert find_start(CONFIG, run, ranks) == Start(paths(run)[1], None, [])


@pytest.mark.parametrize("pointer", ["step-00000006\n", ""])
def test_a_pointer_without_checkpoints_is_refused_rather_than_begun_anew(ranks, run, pointer):
    shutil.rmtree(run / "checkpoints")
    (run / "latest").write_text(pointer)
    with pytest.raises(UserError, match="latest speaks of a checkpoint and there is none"):
        find_start(CONFIG, run, ranks)


def half_written(folder, file):
    """As a killed run leaves it: one file torn, or none there yet."""
    folder.mkdir()
    if file:
        (folder / file).write_bytes(b"\x10\0\0\0\0\0\0\0{")


@pytest.mark.parametrize("file", [None, *FILES])
def test_what_a_killed_run_left_is_ignored_and_gone_after_the_next_save(ranks, run, file):
    for name in ("step-00000009.partial", "step-00000012.partial", "step-00000001.old"):
        half_written(run / "checkpoints" / name, file)
    # all of it was written, but for the name
    shutil.copytree(paths(run)[1], run / "checkpoints" / "step-00000015.partial")
    assert find_start(CONFIG, run, ranks) == Start(paths(run)[1], None, [])
    saved = checkpoint.save(run, 9, fragments(), {"origin": None}, ranks)
    assert find_start(CONFIG, run, ranks) == Start(saved, None, [])
    assert sorted((run / "checkpoints").iterdir()) == [*paths(run), saved]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "latest"]
