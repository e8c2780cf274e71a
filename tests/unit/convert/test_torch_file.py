import io
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from astropt_ds.convert.torch_file import TorchFile
from astropt_ds.convert.unpickle import Stub
from astropt_ds.errors import UserError


def content():
    base = torch.arange(24, dtype=torch.float32)
    return {
        "plain": [1, 2.5, "text", None, True, (3,), {"k": torch.Size([2, 3])}],
        "fp32": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        "bf16": torch.randn(4, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "count": torch.tensor(7),
        "view": base.view(4, 6)[1:3, 2:5],
        "transposed": base.view(4, 6).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0, 3),
        "dtype": torch.bfloat16,
        "numpy": [np.float32(0.3), np.float64(-1e300), np.int64(2**60), np.bool_(True)],
    }


@pytest.fixture
def saved(tmp_path):
    torch.save(content(), tmp_path / "file.pt")
    return tmp_path / "file.pt"


def test_every_tensor_is_what_torch_load_reads(saved):
    found, expected = TorchFile(saved).content, torch.load(saved, weights_only=False)
    assert found["plain"] == expected["plain"]
    assert found["dtype"] == torch.bfloat16
    numbers = [number.item() for number in expected["numpy"]]
    assert found["numpy"] == numbers and list(map(type, numbers)) == [float, float, int, bool]
    for name in ("fp32", "bf16", "count", "view", "transposed", "parameter", "empty"):
        value = found[name].read()
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name].detach()), name


def test_other_numpy_objects_are_refused(tmp_path):
    for value in (np.zeros(3), np.str_("text"), np.datetime64("2026-01-01")):
        torch.save([value], tmp_path / "file.pt")
        with pytest.raises(UserError, match="refused: its pickle asks for numpy|numpy scalar of"):
            TorchFile(tmp_path / "file.pt")


def test_a_part_of_a_flat_tensor_is_read_alone_and_no_more_than_there_is(tmp_path):
    torch.save(flat := torch.randn(1000), tmp_path / "file.pt")
    stored = TorchFile(tmp_path / "file.pt").content
    assert torch.equal(stored.part(990, 10), flat[990:])
    with pytest.raises(UserError, match=r"of shape \[1000\] has no elements 990 to 1001"):
        stored.part(990, 11)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_a_command_is_refused_by_name_and_does_not_run(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"model": {}, "x": Command(ran)}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="refused: its pickle asks for posix.system") as caught:
        TorchFile(tmp_path / "file.pt")
    assert not ran.exists() and "\n" not in str(caught.value)
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert ran.exists()  # it would have


@pytest.mark.parametrize(
    "module, name",
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("functools", "partial"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
        ("astropt.model", "GPT"),
        ("astropt_ds.convert.torch_file", "TorchFile"),
        ("collections", "OrderedDict.__init__"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_but_tensors_and_named_stubs_is_known(tmp_path, module, name, protocol):
    if protocol == 2:
        text = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."
    else:
        parts = b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name))
        text = b"\x80\x04" + parts + b"\x93."
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("archive/data.pkl", text)
    with pytest.raises(UserError, match=f"refused: its pickle asks for {module}.{name}"):
        TorchFile(tmp_path / "file.pt", ["astropt.model.ModalityConfig"])


def test_what_a_pickle_sets_on_what_it_is_given_does_not_outlast_it(tmp_path):
    def write(path, name):
        # BUILD with a state for slots sets attributes on whatever the pickle got
        out = io.BytesIO()
        pickler = pickle._Pickler(out, 2)
        out.write(b"\x80\x02c" + name + b"\n")
        pickler.save((None, {"marked": 1}))
        out.write(b"b.")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", out.getvalue())

    stub = "astropt.model.ModalityConfig"
    write(tmp_path / "a.pt", b"astropt.model\nModalityConfig")
    assert TorchFile(tmp_path / "a.pt", [stub]).content.marked == 1
    write(tmp_path / "b.pt", b"torch._utils\n_rebuild_tensor_v2")
    assert TorchFile(tmp_path / "b.pt").content.marked == 1
    torch.save([1], tmp_path / "c.pt")
    fresh = TorchFile(tmp_path / "c.pt", [stub])
    assert fresh.content == [1] and not hasattr(Stub, "marked")
    write(tmp_path / "d.pt", b"torch\nFloatStorage")
    with pytest.raises(UserError, match="damaged, or no file that torch.save wrote"):
        TorchFile(tmp_path / "d.pt")


@pytest.mark.parametrize(
    "text",
    [
        b"\x80\x02Nr\x00\x00\x00\x10.",  # a memo of 4 GB
        b"\x80\x02Np99999999999\n.",
        b"\x80\x02}" + b"(" * 200_000 + b"K\x01" + b"t" * 200_000 + b"Ns.",  # a stack of tuples
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\x00\x00.",  # bytes of a petabyte
    ],
)
def test_a_forged_pickle_cannot_take_all_memory(tmp_path, text):
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("archive/data.pkl", text)
    asked = r"\((\d+ tuples, where|memo \d+ in|expected \d+ bytes in a bytes8)"
    with pytest.raises(UserError, match=asked):
        TorchFile(tmp_path / "file.pt")


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda data: b"", "damaged, or no file that torch.save wrote"),
        (lambda data: b"PK\x03\x04 and so on", "damaged, or no file that torch.save wrote"),
        (lambda data: data[: len(data) // 2], "damaged, or no file that torch.save wrote"),
        (lambda data: data[:-30], "damaged, or no file that torch.save wrote"),
    ],
)
def test_a_truncated_or_foreign_file_is_told_in_a_line(saved, harm, message):
    saved.write_bytes(harm(saved.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        TorchFile(saved)
    assert "\n" not in str(caught.value)


def test_a_zip_archive_of_something_else_and_a_missing_file_are_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("letter.txt", "dear reader")
    with pytest.raises(UserError, match="a zip archive, but not one that torch.save wrote"):
        TorchFile(tmp_path / "file.pt")
    with pytest.raises(UserError, match="nowhere.pt: cannot be read"):
        TorchFile(tmp_path / "nowhere.pt")


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(saved):
    stored = TorchFile(saved).content["fp32"]
    for change in ({"shape": (4, 5)}, {"offset": 1}, {"offset": -1}, {"stride": (6, 1)}):
        harmed = type(stored)(**{**vars(stored), **change})
        with pytest.raises(UserError, match="ends before its tensor does"):
            harmed.read()


def test_random_corruptions_are_told_or_change_nothing(saved):
    data = saved.read_bytes()
    names = ("fp32", "bf16", "view", "transposed", "parameter")
    expected = {name: TorchFile(saved).content[name].read() for name in names}
    rng = random.Random(1)
    told = 0
    for case in range(300):
        harmed = bytearray(data)
        start, length = rng.randrange(len(data)), rng.choice((1, 1, 4, 64))
        for at in range(start, min(start + length, len(data))):
            harmed[at] ^= rng.randrange(1, 256)
        saved.write_bytes(harmed)
        try:
            found = TorchFile(saved).content
            values = {name: found[name].read() for name in names}
        except UserError as error:
            told += 1
            assert "\n" not in str(error)
        else:
            assert all(torch.equal(values[name], expected[name]) for name in names), case
    assert told > 100
