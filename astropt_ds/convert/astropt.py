"""AstroPT's own checkpoints, .pt files of any generation, as a source."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from astropt_ds.convert.generations import (
    COMPILED,
    MODALITY,
    REGISTRY,
    generation_of,
    read_model,
    upstream_name,
)
from astropt_ds.convert.source import Source
from astropt_ds.convert.torch_file import StoredTensor, TorchFile, number
from astropt_ds.errors import UserError
from astropt_ds.files import sha256_file
from astropt_ds.model import parameter_shapes
from astropt_ds.model_folder.weights import check_tensors, common_dtype
from astropt_ds.training.fragments import MOMENTS, WEIGHT

PARALLEL = "module."  # what torch's DistributedDataParallel puts in front of names
MASK = re.compile(r"transformer\.h\.\d+\.attn\.bias")  # of old torch; a buffer, no weight
NO_LOSS = 1e9  # AstroPT's best_val_loss before its first validation


class AstroPTSource(Source):
    """A file as AstroPT's training script writes it.

    Args:
        path: of the file.

    Raises:
        UserError: it is no such file, is damaged, asks for anything but tensors, or holds a model
            that this package does not have.
    """

    def __init__(self, path: Path) -> None:
        content = TorchFile(path, (MODALITY, REGISTRY)).content
        try:
            self._read(path, content)
        except UserError as error:
            raise UserError(" ".join(str(error).split())) from None  # its names may break lines
        except Exception as error:  # a forged content may fail in any way
            reason = f"{type(error).__name__} {error}"[:200]
            raise UserError(f"{path}: no AstroPT checkpoint ({' '.join(reason.split())})") from None

    def _read(self, path: Path, content: Any) -> None:
        self._stored = _state_dict(path, content)
        generation = generation_of(list(self._stored))
        if generation is None:
            raise UserError(f"{path}: no AstroPT checkpoint: none of its tensors is an encoder's")
        shapes = {name: tensor.shape for name, tensor in self._stored.items()}
        try:
            model = read_model(
                content["model_args"], content.get("modality_registry"), generation, shapes
            )
        except UserError as error:
            raise UserError(f"{path}: AstroPT {generation}: {error}") from None
        wanted = parameter_shapes(model)
        self._names = {name: upstream_name(name, generation) for name in wanted}
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in self._stored.items()}
        check_tensors(path, found, {self._names[name]: shape for name, shape in wanted.items()})
        self._moments, optim, lacks = _optimizer(content.get("optimizer"), self._stored)
        super().__init__(
            what=f"AstroPT {generation} checkpoint",
            format=f"astropt-{generation}",
            model=model,
            dtype=common_dtype(found),
            facts=_facts(content),
            optim=optim,
            lacks=lacks,
            sha256=sha256_file(path),
        )

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """See :meth:`Source.tensor`."""
        theirs = self._names[name]
        stored = self._stored[theirs] if state == WEIGHT else self._moments[theirs][state]
        return stored.read()


def _state_dict(path: Path, content: Any) -> dict[str, StoredTensor]:
    """The model's tensors, without what torch.compile adds to their names."""
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), dict) for key in ("model", "model_args")
    ):
        raise UserError(
            f"{path}: no AstroPT checkpoint, which holds model and model_args, as it saves them; "
            "weights alone do not tell their model"
        )
    found: dict[str, StoredTensor] = {}
    for key, value in content["model"].items():
        name = str(key).replace(COMPILED, "").removeprefix(PARALLEL)
        if not isinstance(value, StoredTensor):
            raise UserError(f"{path}: model.{key} is no tensor")
        if MASK.fullmatch(name):
            continue
        if name in found:
            raise UserError(f"{path}: {name} is there twice, with {COMPILED} and without")
        found[name] = value
    return found


def _facts(content: dict[str, Any]) -> dict[str, Any]:
    """What is said of the training."""
    config = content.get("config")
    told = {
        "step": content.get("iter_num"),
        "best_val_loss": content.get("best_val_loss"),
        "image_size": config.get("image_size") if isinstance(config, dict) else None,
    }
    facts = {key: number(value, math.nan) for key, value in told.items()}
    return {k: v for k, v in facts.items() if math.isfinite(v) and v != NO_LOSS}


def _optimizer(
    saved: Any, weights: dict[str, StoredTensor]
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, Any] | None, str]:
    """AdamW's moments by their weights' names, and its settings; or why they are not there."""
    if not isinstance(saved, dict) or not saved.get("state"):
        return {}, None, "holds no optimizer state"
    try:
        state, groups = saved["state"], saved["param_groups"]
        decayed = [name for name, tensor in weights.items() if len(tensor.shape) >= 2]
        ordered = decayed + [name for name in weights if name not in set(decayed)]
        numbers = [number for group in groups for number in group["params"]]
        moments = {
            name: {moment: state[number][moment] for moment in MOMENTS}
            for name, number in zip(ordered, numbers, strict=True)
        }
        settings = {key: groups[0][key] for key in ("betas",)}
        settings |= {key: number(groups[0][key], 0) for key in ("lr", "eps", "weight_decay")}
        settings["updates"] = number(state[numbers[0]]["step"], 0)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        return {}, None, f"holds an optimizer state that is not AdamW's of its weights ({error!r})"
    for name, entries in moments.items():
        for moment in entries.values():
            if not isinstance(moment, StoredTensor) or moment.shape != weights[name].shape:
                return {}, None, f"holds an optimizer state that does not fit its weight {name}"
    return moments, settings, ""
