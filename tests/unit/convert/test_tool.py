"""tools/convert_checkpoint.py, as it is called."""

import json
import runpy

import pytest
import torch

from astropt_ds.errors import UserError
from tests.conftest import REPOSITORY
from tests.unit.convert.documented import model_args, random_state, save


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    state = random_state("v1", 2, 32)
    save(folder / "ckpt.pt", state, model_args("v1", 2, 4, 32))
    (folder / "text.pt").write_text("dear reader")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def convert(launch):
    def run(*options):
        return launch(1, "tools/convert_checkpoint.py", *options, launcher="python")

    return run


def test_a_file_becomes_a_folder_and_a_file_again(convert, files, tmp_path):
    folder, back = tmp_path / "folder", tmp_path / "back.pt"
    done = convert("--input", files / "ckpt.pt", "--output", folder, "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    found, made = done.stdout.splitlines()
    parameters = sum(tensor.numel() for tensor in random_state("v1", 2, 32).values())
    for part in (
        f"AstroPT v1 checkpoint: {parameters:,} parameters in fp32",
        "AstroPT v1 checkpoint: ",
        "2 layers, 4 heads, width 32, tokeniser relu, rows ",
    ):
        assert part in found
    assert "without optimizer state; can become hub, astropt-v1" in found
    assert made.startswith(f"{folder}: model folder, ")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    done = convert("--input", folder, "--output", back, "--to", "astropt-v1", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    assert "model folder: " in done.stdout
    content = torch.load(back, weights_only=False)
    for name, tensor in random_state("v1", 2, 32).items():
        assert torch.equal(content["model"][name], tensor.bfloat16().float())


def test_a_dry_run_tells_and_writes_nothing(convert, files, tmp_path):
    done = convert("--input", files / "ckpt.pt", "--dry-run", "--output", tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    assert "AstroPT v1 checkpoint: " in done.stdout and len(done.stdout.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (("--input", "{files}/ckpt.pt"), "--output is missing: where to write"),
        (("--input", "{files}/nowhere", "--dry-run"), "{files}/nowhere: does not exist; a model"),
        (("--input", "{files}/text.pt", "--dry-run"), "{files}/text.pt: not recognised; a model"),
        (("--input", "{files}/empty", "--dry-run"), "{files}/empty: not recognised; a model"),
        (
            ("--input", "{files}/ckpt.pt", "--output", "{files}/empty"),
            "{files}/empty: cannot be written (exists already)",
        ),
        (
            ("--input", "{files}/ckpt.pt", "--output", "{new}.pt"),
            "new.pt: the name of a file; a model folder is made, or with --to astropt-v1, say",
        ),
        (
            ("--input", "{files}/ckpt.pt", "--dry-run", "--to", "astropt-v3"),
            "astropt-v3 cannot express the model: tokeniser relu is no v3's",
        ),
        (
            ("--input", "{files}/ckpt.pt", "--output", "{new}", "--to", "astropt-v2"),
            "astropt-v2 cannot express the model: tokeniser relu is no v2's",
        ),
        (
            ("--input", "{files}/ckpt.pt", "--output", "{new}", "--optimizer"),
            "--optimizer: a model folder holds weights alone",
        ),
        (
            (
                *("--input", "{files}/ckpt.pt", "--output", "{new}"),
                *("--to", "astropt-v1", "--optimizer"),
            ),
            "the AstroPT v1 checkpoint holds no optimizer state",
        ),
        (("--input", "{files}/ckpt.pt", "--config", "1m", "--dry-run"), "tells its own model"),
        (("--input", "{files}/text.pt", "--config", "1m", "--dry-run"), "text.pt: not recognised"),
        (
            (
                *("--input", "{files}/ckpt.pt", "--output", "{new}"),
                *("--to", "astropt-v1", "--license", "mit"),
            ),
            "--license and --dataset: an AstroPT file has no model card",
        ),
        (
            ("--input", "{files}/ckpt.pt", "--output", "{new}", "--license", "My License"),
            "license=My License: not an identifier of the Hugging Face hub",
        ),
        (
            ("--input", "{files}/ckpt.pt", "--dry-run", "model.width=32"),
            "model.width=32: goes with --config",
        ),
    ],
)
def test_a_mistake_is_told_in_a_line_and_writes_nothing(files, tmp_path, options, message):
    places = {"files": files, "new": tmp_path / "new"}
    main = runpy.run_path(str(REPOSITORY / "tools" / "convert_checkpoint.py"))["main"]
    with pytest.raises(UserError) as caught:
        main([option.format(**places) for option in options])
    assert message.format(**places) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_it_ends_with_that_line_and_a_code_that_is_not_zero(convert, files):
    done = convert("--input", files / "text.pt", "--dry-run")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {files / 'text.pt'}: not recognised; a model folder")
