"""Runs and their checkpoints as a source, whatever ZeRO stage and number of ranks wrote them."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from astropt_ds.config import Config
from astropt_ds.convert.source import Source
from astropt_ds.errors import UserError, say
from astropt_ds.model import parameter_shapes
from astropt_ds.model_folder.weights import check_tensors
from astropt_ds.training import checkpoint
from astropt_ds.training.facts import training_facts
from astropt_ds.training.fragments import STATES, WEIGHT
from astropt_ds.training.ranks import ALONE
from astropt_ds.training.staging import check_cover, whole


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint or a run's folder, by what is in it."""
    parts = ("checkpoints", "metrics.jsonl", checkpoint.MARKER)
    return bool(checkpoint.NAME.fullmatch(path.name)) or any((path / p).exists() for p in parts)


class CheckpointSource(Source):
    """A checkpoint, or the newest of a run that verifies.

    Args:
        path: a checkpoint's folder or a run's; newer checkpoints that are damaged are told.

    Raises:
        UserError: there is none that verifies.
    """

    def __init__(self, path: Path) -> None:
        found, passed_over = checkpoint.find(path, ALONE)
        if found is None:
            problems = "; ".join(f"{p}: {problem}" for p, problem in passed_over)
            raise UserError(f"{path}: no checkpoint that verifies ({problems or 'none at all'})")
        for damaged, problem in passed_over:
            say(f"warning: {damaged} is damaged ({problem}); taking {found}")
        self._path = found
        manifest = checkpoint.read_manifest(found)
        self._tensors = manifest["tensors"]
        state = manifest["state"]
        try:
            config = Config.model_validate(state["config"])
            updates = state["engine"]["updates"]
            facts = state.get("facts")  # the first of this format lack them
            facts = facts or training_facts(config, manifest["step"], updates, None, {})
        except (KeyError, TypeError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{found / checkpoint.MANIFEST}: not a run's ({reason})") from None
        try:
            check_cover(self._tensors, STATES)
        except UserError as error:
            raise UserError(f"{found}: {error}") from None
        tensors = {name: (tuple(t["shape"]), torch.float32) for name, t in self._tensors.items()}
        check_tensors(found, tensors, parameter_shapes(config.model))
        optim = config.optim.model_dump(include={"lr", "betas", "eps", "weight_decay"})
        optim["updates"] = updates
        what = f"checkpoint of step {manifest['step']}"
        super().__init__(what, checkpoint.FORMAT, config.model, torch.float32, facts, optim)

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """See :meth:`Source.tensor`."""
        return whole(self._path, self._tensors, name, state)
