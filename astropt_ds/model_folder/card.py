"""The model card of a model folder: README.md, as the Hugging Face hub reads and shows it."""

from __future__ import annotations

import math
from typing import Any

import torch
import yaml

from astropt_ds.config import ModelConfig
from astropt_ds.model import parameter_shapes
from astropt_ds.model_folder.config_json import GENERATIONS, preprocessing
from astropt_ds.model_folder.release import Release

CARD = "README.md"
TAGS = ["astronomy", "galaxies", "astropt", "self-supervised"]
TRAINING = {
    "step": "steps",
    "updates": "updates",
    "samples": "images",
    "tokens": "tokens",
    "flops": "FLOPs",
    "loss": "training loss (Huber, delta 1, of standardised patches)",
    "val_loss": "validation loss",
    "best_val_loss": "best validation loss",
    "data": "hash of the data",
    "source": "made from",
}


def model_card(model: ModelConfig, dtype: torch.dtype, facts: dict, release: Release) -> str:
    """The text of README.md; the same input gives the same bytes.

    Args:
        model: that it describes.
        dtype: of the weights.
        facts: of the training; those that are missing are left out.
        release: licence and data sets.
    """
    parameters = sum(map(math.prod, parameter_shapes(model).values()))
    name = f"AstroPT {_magnitude(parameters)}"
    fields = yaml.safe_dump(_fields(name, facts, release), sort_keys=False)
    patch, channels = model.images.patch, model.images.channels
    side = facts.get("image_size")
    if not isinstance(side, int) or side < patch or side % patch:
        side = math.isqrt(model.block_size) * patch
    architecture = {
        "parameters": f"{parameters:,}",
        "layers, heads, width": f"{model.layers}, {model.heads}, {model.width}",
        "generation": f"{GENERATIONS[model.tokeniser]} (tokeniser `{model.tokeniser}`)",
        "orientation": f"`{model.orientation}`",
        "attention": model.attention,
        "a token": f"{patch} x {patch} pixels of {channels} channels",
        "most tokens": model.block_size,
        "weights": str(dtype).removeprefix("torch."),
    }
    training = {
        title: _shown(facts[key]) for key, title in TRAINING.items() if facts.get(key) is not None
    }
    return CARD_TEXT.format(
        fields=fields,
        name=name,
        patch=patch,
        architecture=_table(architecture),
        preprocessing=_table(preprocessing(model, facts)),
        training=_table(training) if training else "Nothing is known of it.",
        channels=channels,
        images=f"torch.zeros(1, {side}, {side}, {channels}, dtype=torch.uint8)",
    )


def _fields(name: str, facts: dict, release: Release) -> dict[str, Any]:
    """The front matter: the fields that the hub knows."""
    fields: dict[str, Any] = {
        "license": release.license,
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": TAGS,
    }
    if release.datasets:
        fields["datasets"] = list(release.datasets)
    losses = [facts.get(key) for key in ("val_loss", "best_val_loss")]
    if known := [loss for loss in losses if isinstance(loss, float) and math.isfinite(loss)]:
        fields["metrics"] = ["huber_loss"]
        only = release.datasets[0] if len(release.datasets) == 1 else None
        result = {
            "task": {"type": "image-feature-extraction", "name": "next-patch prediction"},
            "dataset": {"type": only or "unknown", "name": only or "validation images"},
            "metrics": [{"type": "huber_loss", "name": "validation Huber loss", "value": known[0]}],
        }
        fields["model-index"] = [{"name": name, "results": [result]}]
    return fields


def _magnitude(parameters: int) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(part)}" for key, part in value.items())
    if isinstance(value, int):
        return f"{value:,}" if value < 1e12 else f"{value:.3g}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(f"{value}".replace("|", " ").split())  # which would break the table


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {rows[key]} |" for key in rows)])


CARD_TEXT = """---
{fields}---

# {name}

An [AstroPT](https://arxiv.org/abs/2405.14930) model: a transformer that reads a galaxy image as a
spiral of {patch}x{patch} patches, from the centre outwards, and predicts each patch from those
before it. Its hidden states are embeddings of galaxies. astropt_ds wrote this folder.

{architecture}

## Preprocessing

`model.tokens(images)` does all of it, on images of shape (batch, side, side, {channels}).

{preprocessing}

## Training

{training}

## Use

With [transformers](https://huggingface.co/docs/transformers) 4.56 or newer, and the code in this
folder:

```python
import torch
from transformers import AutoModel

images = {images}  # yours instead
model = AutoModel.from_pretrained("ORGANISATION/NAME", trust_remote_code=True)  # or this folder
with torch.no_grad():
    tokens = model.tokens(images)
    embeddings = model.hidden_states(tokens, "middle").mean(dim=1)
    predictions, _ = model(tokens)  # of the patch that follows each
```

With astropt_ds:

```python
import astropt_ds
import torch

images = {images}  # yours instead
model = astropt_ds.load_model("ORGANISATION/NAME")  # or this folder
with torch.no_grad():
    tokens = model.tokens(images)
    embeddings = model.hidden_states(tokens, "middle").mean(dim=1)
    predictions, _ = model(tokens)  # of the patch that follows each
```

## Citation

```bibtex
@article{{smith2024astropt,
  title = {{AstroPT: Scaling Large Observation Models for Astronomy}},
  author = {{Smith, Michael J. and Roberts, Ryan J. and Angeloudi, Eirini and
            Huertas-Company, Marc}},
  journal = {{arXiv preprint arXiv:2405.14930}},
  year = {{2024}},
}}
```
"""
