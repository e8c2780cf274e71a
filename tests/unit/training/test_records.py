import io
import json
import sys

import numpy as np
import pytest
import torch

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.tokens import grid, standardise
from astropt_ds.training import ranks as ranks_module
from astropt_ds.training.metrics import Metrics, read_metrics
from astropt_ds.training.progress import Progress
from astropt_ds.training.samples import reconstruction_picture
from tests.conftest import blob

CONFIG = load_config("1m")


def test_records_are_one_json_object_a_line_and_survive_a_resume_once_each(tmp_path):
    metrics = Metrics(tmp_path, 0, CONFIG)
    for step in range(1, 6):
        metrics.write("train", step, loss=1.0 / step, mfu=None)
        if step == 3:
            metrics.write("event", step, event="checkpoint", text="saved")
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    resumed = Metrics(tmp_path, 3, CONFIG)
    resumed.write("train", 4, loss=9.0)
    resumed.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(tmp_path)
    steps = [(r["kind"], r["step"]) for r in read_metrics(tmp_path)]
    expected = [("train", 1), ("train", 2), ("train", 3), ("event", 3), ("train", 4)]
    assert steps == expected
    assert read_metrics(tmp_path)[0]["mfu"] is None


def test_a_run_from_the_start_drops_the_records_of_one_that_never_saved(tmp_path):
    first = Metrics(tmp_path, 0, CONFIG)
    first.write("val", 0, loss=1.0)
    first.close()
    Metrics(tmp_path, 0, CONFIG).close()
    assert read_metrics(tmp_path) == []


def test_a_log_gets_a_line_with_rate_and_time_left(capsys):
    progress = Progress(step=0, steps=100, tokens_per_image=1024)
    progress.update(1, loss=0.5, lr=1e-3, images=32, seconds=2.0)
    progress.update(2, loss=0.5, lr=1e-3, images=32, seconds=2.0)  # too soon for another line
    progress.close()
    assert capsys.readouterr().out == (
        "step 1/100  loss 0.5000  lr 1.00e-03  16.0 images/s  16,384 tokens/s  ETA 0:03:18\n"
    )


def test_a_terminal_gets_a_bar(monkeypatch):
    written = io.StringIO()
    written.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", written)
    progress = Progress(step=3, steps=100, tokens_per_image=1024)
    progress._bar.mininterval = 0
    progress.update(4, loss=0.5, lr=1e-3, images=32, seconds=2.0)
    progress.close()
    assert "4/100 |" in written.getvalue()
    assert "| loss 0.5000  lr 1.00e-03" in written.getvalue()


@pytest.mark.parametrize("orientation", ["rows", "columns"])
def test_a_perfect_prediction_looks_like_the_galaxy(orientation):
    g = grid(64, 16, orientation)
    images = [blob(i) for i in range(3)]
    patches = torch.from_numpy(np.stack([g.to_patches(image) for image in images]))
    picture = reconstruction_picture(patches, standardise(patches)[:, 1:], g)
    pixels = np.asarray(picture).astype(int)
    assert pixels.shape == (2 * 64 + 4, 3 * 64 + 2 * 4, 3)
    for i, image in enumerate(images):
        left = i * 68
        assert (pixels[:64, left : left + 64] == image).all()
        assert np.abs(pixels[68:, left : left + 64] - image).max() <= 1


def test_fluxes_of_any_scale_are_shown_from_black_to_white():
    g = grid(64, 16, "rows")
    image = blob(0).astype(np.float32)
    patches = torch.from_numpy(np.stack([g.to_patches(image * scale) for scale in (1e-4, 1e3)]))
    picture = reconstruction_picture(patches, standardise(patches)[:, 1:], g)
    pixels = np.asarray(picture).astype(int)
    first, second = pixels[:, :64], pixels[:, 68:]
    assert np.abs(first - second).max() <= 1
    assert np.abs(first[:64] - first[68:]).max() <= 1
    assert first.min() == 0 and first.max() == 255
    assert np.corrcoef(first[:64].ravel(), image.ravel())[0, 1] > 0.99


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    gpu = torch.device("cuda", 0)
    with pytest.raises(UserError, match="precision=bf16: Tesla V100 has no bf16; fp32 would be"):
        ranks_module.check_precision("bf16", gpu)
    ranks_module.check_precision("fp32", gpu)
    ranks_module.check_precision("bf16", torch.device("cpu"))
