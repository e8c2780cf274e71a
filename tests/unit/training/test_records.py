import io
import math
import sys

import numpy as np
import pytest
import torch

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.tokens import grid, standardise
from astropt_ds.training import ranks as ranks_module
from astropt_ds.training.metrics import read_metrics
from astropt_ds.training.progress import Progress
from astropt_ds.training.ranks import ALONE
from astropt_ds.training.records import Records
from astropt_ds.training.samples import reconstruction_picture
from astropt_ds.training.validation import Validation
from tests.conftest import blob


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


def test_a_validation_loss_that_is_no_number_is_on_record_as_null(tmp_path, capsys):
    config = load_config("1m", ["data.image_size=64", "data.path=shards"])
    records = Records(config, config, tmp_path, 0, ALONE)
    nothing = torch.empty(0, 16, 768)
    found = Validation(math.nan, 0.5, math.inf, 8, [], nothing, nothing)
    records.validation(3, found, grid(64, 16, "rows"))
    assert "validation loss not taken here" in records.summary()
    records.close()
    (record,) = [each for each in read_metrics(tmp_path) if each["kind"] == "val"]
    assert (record["loss"], record["loss_zeros"], record["loss_previous"]) == (None, 0.5, None)
