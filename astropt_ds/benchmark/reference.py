"""AstroPT's own package, PyPI's astropt 2.0.9: from a file to spiral tokens, and its model."""

from __future__ import annotations

import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from astropt_ds.convert.load import LiveSource
from astropt_ds.convert.write import write_astropt
from astropt_ds.errors import UserError
from astropt_ds.model import AstroPT

VERSION = "2.0.9"


def reference_dataset(files: list[Path], folder: Path, transposed: bool = False) -> Any:
    """A dataset whose item i is file i as standardised patches in spiral order.

    The package asks torchvision for one function, which reads a JPEG; it gets Pillow's, as it does
    where it streams its data set from the hub. All else is its own code; the standardisation is
    that of its training script: (x - mean) / (std + 1e-8), in fp16.

    Args:
        files: JPEG images.
        folder: for the list of files that the package reads.
        transposed: images are read x before y, as the second generation's are.

    Raises:
        UserError: the package is not installed.
    """
    stands_in = "torchvision" not in sys.modules
    if stands_in:
        io = types.ModuleType("torchvision.io")
        io.read_image = partial(_read_image, transposed)  # type: ignore[attr-defined]
        torchvision = types.ModuleType("torchvision")
        torchvision.io = io  # type: ignore[attr-defined]
        sys.modules.update({"torchvision": torchvision, "torchvision.io": io})
    try:
        from astropt.local_datasets import GalaxyImageDataset
        from astropt.model import ModalityConfig, ModalityRegistry
    except ImportError as error:
        raise UserError(
            f"--against astropt: {error}; "
            f"pip install --no-deps astropt=={VERSION} loralib, einops and astropy bring it"
        ) from None
    finally:
        if stands_in:  # other libraries would take it for the real one
            del sys.modules["torchvision"], sys.modules["torchvision.io"]
    (folder / "files.txt").write_text("\n".join(map(str, files)) + "\n")
    images = ModalityConfig(
        name="images", input_size=768, pos_input_size=1, patch_size=16, embed_pos=True
    )
    return GalaxyImageDataset(
        paths={"images": str(folder / "files.txt")},
        transform={"images": reference_normalise},
        stochastic=False,
        spiral=True,
        modality_registry=ModalityRegistry([images]),
    )


def reference_model(model: AstroPT, folder: Path) -> Any:
    """The package's own model with the weights of ours, which are of its second generation.

    Args:
        model: tokeniser aim.
        folder: for the file that carries the weights.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from astropt.model_utils import load_astropt
    except ImportError as error:
        raise UserError(f"--against astropt: {error}") from None
    write_astropt(LiveSource(model, {}), folder / "ckpt.pt", "v2")
    return load_astropt(repo_id=None, path=f"{folder}/", weights_filename="ckpt.pt").eval()


def _read_image(transposed: bool, path: str) -> torch.Tensor:
    axes = (2, 1, 0) if transposed else (2, 0, 1)
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(axes)


def reference_normalise(x: torch.Tensor) -> torch.Tensor:
    """Standardise patches (tokens, values) as the package's training script does, into fp16."""
    std, mean = torch.std_mean(x, dim=1, keepdim=True)
    return ((x - mean) / (std + 1e-8)).to(torch.float16)
