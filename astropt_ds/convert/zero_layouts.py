"""Where DeepSpeed 0.19 keeps weights and AdamW's moments in the files of a checkpoint.

Stage 0 keeps the module and the optimizer as they are; a universal checkpoint has a folder a
parameter. ``zero_partitions`` has the other stages.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astropt_ds.convert.torch_file import StoredTensor, TorchFile
from astropt_ds.errors import UserError
from astropt_ds.model_folder.weights import StoredAs
from astropt_ds.training.fragments import MOMENTS, STATES, WEIGHT

# What the pickles hold instances of besides tensors; nothing is read from them but the stage.
STUBS = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
LOSS_SCALING = {
    *("dynamic_loss_scale", "cur_scale", "cur_iter"),
    *("last_overflow_iter", "scale_factor", "scale_window"),
}
MOST = 2**53  # of anything that is counted: what JSON's readers keep exact
UNIVERSAL_NAMES = {WEIGHT: "fp32", **{moment: moment for moment in MOMENTS}}


@dataclass
class Layout(ABC):
    """The tensors of a checkpoint by DeepSpeed's names, which are the trained module's.

    Attributes:
        what: it is, in words.
        step: updates that DeepSpeed counted.
        updates: those that AdamW counted, where its moments are there.
        tensors: shape and dtype of each weight.
        groups: AdamW's groups of parameters, with lr and the like, where its moments are there.
        problems: why the tensors cannot all be read.
    """

    what: str
    step: int
    updates: int
    tensors: dict[str, StoredAs]
    groups: list[dict[str, Any]] | None = None
    problems: list[str] = field(default_factory=list)

    @abstractmethod
    def read(self, name: str, state: str) -> Tensor:
        """One tensor, 1-D or of its shape.

        Raises:
            UserError: what is stored is damaged.
        """


@contextmanager
def known_layout(path: Path) -> Iterator[None]:
    """Turn what is not where it should be in a file's content into a user's error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a pickle may hold anything anywhere
        reason = " ".join(repr(error).split())
        raise UserError(f"{path}: not laid out as by DeepSpeed 0.19 ({reason})") from None


def stored_tensor(value: Any) -> StoredTensor:
    """The value, which must be one."""
    if not isinstance(value, StoredTensor):
        raise TypeError(f"{type(value).__name__} for a tensor")
    return value


def count(value: Any, least: int = 0, most: int = MOST) -> int:
    """A stored count, which may be a tensor of one element."""
    number = value.read().item() if isinstance(value, StoredTensor) else value
    if type(number) not in (int, float) or number % 1 or not least <= number <= most:
        raise ValueError(f"{number!s:.40} is no count from {least} to {most}")
    return int(number)


class Whole(Layout):
    """Stage 0: the module's own tensors or, of a module in half precision, AdamW's fp32 masters.

    AdamW numbers its parameters. Which is which follows from the shapes if they were grouped as
    upstream and we do, matrices before the rest, or not at all; else the moments are left.
    """

    def __init__(self, header: TorchFile) -> None:
        buffers = header.content["buffer_names"]
        module = header.content["module"].items()
        weights = {name: stored_tensor(value) for name, value in module if name not in buffers}
        self._tensors, self._module = {WEIGHT: weights}, weights
        optimizer, masters = _unwrapped(header)
        groups, state = optimizer.get("param_groups", []), optimizer.get("state", {})
        entries = [state.get(n, {}) for group in groups for n in group["params"]]
        names = sorted(weights, key=lambda name: len(groups) > 1 and len(weights[name].shape) < 2)
        for moment in MOMENTS:
            values = [entry[moment] for entry in entries if moment in entry]
            shapes = [value.shape for value in values]
            if shapes == [weights[name].shape for name in names]:
                self._tensors[moment] = dict(zip(names, values, strict=True))
        if masters is not None:
            if [master.shape for master in masters] != [weights[name].shape for name in names]:
                raise UserError(f"{header.path}: fp32_groups are not in a known order")
            self._tensors[WEIGHT] = dict(zip(names, masters, strict=True))
        step = count(header.content["global_steps"])
        super().__init__(
            "ZeRO stage 0",
            step,
            next((count(entry["step"]) for entry in entries if "step" in entry), step),
            {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors[WEIGHT].items()},
            groups if set(MOMENTS) <= self._tensors.keys() else None,
        )

    def read(self, name: str, state: str) -> Tensor:
        """See :meth:`Layout.read`."""
        values = self._tensors[state][name].read()
        if state == WEIGHT and (module := self._module[name]) is not self._tensors[WEIGHT][name]:
            # they were told apart by their shapes alone
            rounded = values.to(module.dtype)
            if not torch.allclose(rounded, module.read(), rtol=0, atol=0, equal_nan=True):
                raise UserError(f"{module.file.path}: the fp32 master of {name} is of another one")
        return values


def _unwrapped(header: TorchFile) -> tuple[dict[str, Any], list[StoredTensor] | None]:
    """AdamW's state and, in the order of its parameters, its fp32 masters if it has its own."""
    optimizer, masters = header.content["optimizer"] or {}, None
    if "fp32_groups" in optimizer:  # FP16_UnfusedOptimizer, which bf16 has as well
        masters = [stored_tensor(each) for group in optimizer["fp32_groups"] for each in group]
        if more := optimizer.keys() - {"fp32_groups", "optimizer_state_dict", *LOSS_SCALING}:
            raise _not_read(header.path, more)
        optimizer = optimizer["optimizer_state_dict"]
    if more := optimizer.keys() - {"state", "param_groups"}:
        raise _not_read(header.path, more)
    return optimizer, masters


def _not_read(path: Path, keys: set[Any]) -> UserError:
    names = " ".join(", ".join(sorted(map(str, keys))).split())
    return UserError(f"{path}: the optimizer's state has {names}, which are not read")


class Universal(Layout):
    """A universal checkpoint, as ds_to_universal makes it: a folder a parameter, a file a state."""

    def __init__(self, header: TorchFile, folder: Path) -> None:
        shapes = {n: s for group in header.content["param_shapes"] for n, s in group.items()}
        self._stored: dict[tuple[str, str], StoredTensor] = {}
        problems = []
        tensors: dict[str, StoredAs] = {}
        for state in STATES:
            for path in sorted(folder.glob(f"*/{UNIVERSAL_NAMES[state]}.pt")):
                try:
                    content = TorchFile(path, STUBS).content
                    with known_layout(path):
                        stored = stored_tensor(
                            content["param"] if isinstance(content, dict) else content
                        )
                except UserError as error:
                    problems.append(str(error))
                    continue
                name = path.parent.name
                self._stored[name, state] = stored
                shape = shapes.get(name, stored.shape)
                if math.prod(stored.shape) != math.prod(shape):
                    problems.append(f"{path} is {list(stored.shape)}, not {list(shape)}")
                if state == WEIGHT:
                    tensors[name] = (shape, stored.dtype)
        with_moments = any(state in MOMENTS for _, state in self._stored)
        if with_moments:
            wanted = [(name, moment) for name in tensors for moment in MOMENTS]
            lacking = [f"{n}/{m}.pt" for n, m in wanted if (n, m) not in self._stored]
            problems += [f"missing: {', '.join(lacking)}"] if lacking else []
        optimizer = TorchFile(folder / "optimizer_state.pt", STUBS)
        with known_layout(optimizer.path):
            groups = optimizer.content["param_groups"]
        step = count(header.content["global_steps"])
        if counts := sorted(folder.glob("*/step.pt")):
            with known_layout(counts[0]):
                updates = count(TorchFile(counts[0], STUBS).content)
        else:  # made from stage 3, whose optimizer is there whole
            with known_layout(optimizer.path):
                adamw = optimizer.content.get("optimizer_state_dict", {"state": {}})
                updates = count(adamw["state"].get(0, {}).get("step", step))
        super().__init__(
            "universal",
            step,
            updates,
            tensors,
            groups if with_moments else None,
            problems,
        )

    def read(self, name: str, state: str) -> Tensor:
        """See :meth:`Layout.read`."""
        return self._stored[name, state].read()
