"""Models in Python: loaded from wherever their weights are, saved as model folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astropt_ds.attention import resolve_kernel
from astropt_ds.convert.find import open_source
from astropt_ds.convert.generations import COMPILED
from astropt_ds.convert.hub import HUB_ID, download
from astropt_ds.convert.source import Source
from astropt_ds.convert.write import write_model_folder
from astropt_ds.errors import UserError
from astropt_ds.model import AstroPT, parameter_shapes
from astropt_ds.model_folder.release import Release
from astropt_ds.model_folder.weights import DTYPES, cast, check_tensors, common_dtype
from astropt_ds.training.fragments import WEIGHT


def load_model(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    kernel: str = "auto",
) -> AstroPT:
    """Load a model, in eval mode; ``model.tokens(images)`` is its preprocessing.

    Args:
        path: a model folder, a run's folder or one of its checkpoints, an AstroPT .pt file, or the
            id of a model folder on the Hugging Face hub: ``organisation/name``, or
            ``organisation/name@revision``.
        dtype: of the weights: fp32, bf16, fp16 or torch's; as they are stored if None.
        device: to load to.
        kernel: of attention, as :func:`~astropt_ds.attention.resolve_kernel` takes it.

    Raises:
        UserError: there is no such model, it is damaged, a value is too large for the dtype, or
            the kernel cannot run.
    """
    wanted = _dtype(dtype)
    source, where = open_model(path), torch.device(device)
    head_dim = source.model.width // source.model.heads
    resolve_kernel(kernel, where, wanted or source.dtype, head_dim)  # refuses early
    return build(source, wanted, where, kernel)


def open_model(path: str | Path) -> Source:
    """Whatever holds a model's weights, as :func:`load_model` finds it, before they are read.

    Raises:
        UserError: there is no such model.
    """
    if isinstance(path, str) and HUB_ID.fullmatch(path) and not Path(path).exists():
        path = download(path)
    return open_source(Path(path))


def build(
    source: Source, dtype: torch.dtype | None, device: torch.device, kernel: str = "auto"
) -> AstroPT:
    """The model of a source, in eval mode; its dtype is that of the source's weights if None.

    Raises:
        UserError: the weights are damaged, or one is too large for the dtype.
    """
    with torch.device("meta"):
        model = AstroPT(source.model, kernel=kernel)
    model = model.to(dtype or source.dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(cast(name, source.tensor(name), parameter.dtype))
    return model.eval()


def save_model(
    model: AstroPT,
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    training: Mapping[str, Any] | None = None,
    release: Release | None = None,
) -> None:
    """Write a model folder; it appears whole or not at all.

    Args:
        model: with its weights.
        folder: which must not exist.
        dtype: of the weights in it: fp32, bf16, fp16 or torch's; the model's if None.
        training: facts for config.json and the model card, as JSON holds them; a loaded model
            does not carry those of its folder.
        release: licence and data sets, for the card.

    Raises:
        UserError: a value is too large for the dtype, or the folder cannot be written.
    """
    if not isinstance(getattr(model, "_orig_mod", model), AstroPT):
        raise TypeError(f"{type(model).__name__} is no AstroPT")
    write_model_folder(LiveSource(model, training or {}), Path(folder), _dtype(dtype), release)


class LiveSource(Source):
    """A model in memory.

    Args:
        model: any.
        facts: of its training.
    """

    def __init__(self, model: AstroPT, facts: Mapping[str, Any]) -> None:
        named = model.named_parameters()
        self._parameters = {name.replace(COMPILED, ""): p for name, p in named}
        found = {name: (tuple(p.shape), p.dtype) for name, p in self._parameters.items()}
        check_tensors("model", found, parameter_shapes(model.config))
        super().__init__("model", "astropt-ds", model.config, common_dtype(found), dict(facts))

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """See :meth:`Source.tensor`."""
        return self._parameters[name].detach().cpu()


def _dtype(wanted: torch.dtype | str | None) -> torch.dtype | None:
    named = {**DTYPES, **{str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}}
    found = named.get(wanted) if isinstance(wanted, str) else wanted
    if wanted is not None and found not in DTYPES.values():
        raise UserError(f"dtype={wanted}: one of {', '.join(DTYPES)} would be right")
    return found
