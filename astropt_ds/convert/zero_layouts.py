"""Where DeepSpeed 0.19 keeps weights and AdamW's moments in the files of a checkpoint.

Stage 0 keeps the module and the optimizer as they are. Stages 1 and 2 lay the parameters of a
group end to end and cut the whole among the ranks; stage 3 cuts each parameter among the ranks and
lays the shares end to end. Both keep fp32 masters, a file a rank. A universal checkpoint has a
folder a parameter.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from astropt_ds.convert.torch_file import StoredTensor, TorchFile
from astropt_ds.errors import UserError
from astropt_ds.model_folder.weights import StoredAs
from astropt_ds.training.fragments import MOMENTS, STATES, WEIGHT

# What the pickles hold instances of besides tensors; nothing is read from them but the stage.
STUBS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
MODEL_FILES, OPTIM_FILES = "*mp_rank_*_model_states.pt", "*_optim_states.pt"
OPTIM_FILE = re.compile(r"(.*zero_pp_rank_)(\d+)(_mp_rank_00_optim_states\.pt)")
UNIVERSAL = "zero"  # the folder that a universal checkpoint is known by
ALIGNMENT = 2  # elements: stages 1 and 2 pad a group so that each rank's part is a multiple
UNIVERSAL_NAMES = {WEIGHT: "fp32", **{moment: moment for moment in MOMENTS}}


@dataclass
class Layout(ABC):
    """The tensors of a checkpoint by DeepSpeed's names, which are the trained module's.

    Attributes:
        what: it is, in words.
        step: updates made.
        tensors: shape and dtype of each weight.
        groups: AdamW's groups of parameters, with lr and the like, where its moments are there.
        problems: why the tensors cannot all be read.
    """

    what: str
    step: int
    tensors: dict[str, StoredAs]
    groups: list[dict[str, Any]] | None = None
    problems: list[str] = field(default_factory=list)

    @abstractmethod
    def read(self, name: str, state: str) -> Tensor:
        """One tensor, 1-D or of its shape.

        Raises:
            UserError: what is stored is damaged.
        """


def open_layout(folder: Path) -> Layout:
    """Open a checkpoint's folder.

    Raises:
        UserError: it is damaged, or of a kind that is not read.
    """
    headers = sorted(folder.glob(MODEL_FILES))
    alone = [path for path in headers if path.name.startswith("mp_rank_")]
    if not headers or (alone and len(headers) > 1):
        found = ", ".join(path.name for path in headers) or "none"
        raise UserError(
            f"{folder}: mp_rank_00_model_states.pt alone, or one of the form "
            f"zero_pp_rank_0_mp_rank_00_model_states.pt a rank would be right; found {found}"
        )
    if parallel := [p.name for p in folder.glob("*_mp_rank_*.pt") if "_mp_rank_00_" not in p.name]:
        raise UserError(f"{folder}: {parallel[0]} is of a tensor-parallel model, which is not read")
    header = TorchFile(headers[0], STUBS)
    with _known_layout(header.path):
        if frozen := header.content["frozen_param_shapes"]:
            names = ", ".join(frozen)
            raise UserError(f"{header.path}: parameters were frozen, which is not read: {names}")
        if header.content["param_shapes"] is None:
            return Whole(header)
        if (folder / UNIVERSAL).is_dir():
            return Universal(header, folder / UNIVERSAL)
        return Partitioned(header, folder)


@contextmanager
def _known_layout(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not laid out as by DeepSpeed 0.19 ({error!r})") from None


def _stored(value: Any) -> StoredTensor:
    if not isinstance(value, StoredTensor):
        raise TypeError(f"{type(value).__name__} for a tensor")
    return value


class Whole(Layout):
    """Stage 0: the module's own tensors.

    AdamW numbers its parameters. Which is which follows from the shapes if they were grouped as
    upstream and we do, matrices before the rest, or not at all; else the moments are left.
    """

    def __init__(self, header: TorchFile) -> None:
        buffers = header.content["buffer_names"]
        module = header.content["module"].items()
        weights = {name: _stored(value) for name, value in module if name not in buffers}
        self._tensors = {WEIGHT: weights}
        optimizer = header.content["optimizer"] or {}
        groups, state = optimizer.get("param_groups", []), optimizer.get("state", {})
        entries = [state.get(n, {}) for group in groups for n in group["params"]]
        names = sorted(weights, key=lambda name: len(groups) > 1 and len(weights[name].shape) < 2)
        for moment in MOMENTS:
            values = [entry[moment] for entry in entries if moment in entry]
            shapes = [value.shape for value in values]
            if shapes == [weights[name].shape for name in names]:
                self._tensors[moment] = dict(zip(names, values, strict=True))
        super().__init__(
            "ZeRO stage 0",
            header.content["global_steps"],
            {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()},
            groups if set(MOMENTS) <= self._tensors.keys() else None,
        )

    def read(self, name: str, state: str) -> Tensor:
        """See :meth:`Layout.read`."""
        return self._tensors[state][name].read()


class _Place(NamedTuple):
    """Where a parameter is: a group, its first element there or in each share of it, its length."""

    group: int
    start: int
    length: int


@dataclass(frozen=True)
class _Rank:
    """What one rank's file holds: a part of each group, in each state."""

    path: Path
    stage: int
    count: int
    parts: Mapping[str, list[StoredTensor]]
    groups: list[dict[str, Any]]
    paddings: list[list[int]] | None


class Partitioned(Layout):
    """Stages 1, 2 and 3, and bf16's own optimizer: a file a rank with its part of every group."""

    def __init__(self, header: TorchFile, folder: Path) -> None:
        problems: list[str] = []
        ranks: dict[int, _Rank] = {}
        for path in sorted(folder.glob(OPTIM_FILES)):
            if not (match := OPTIM_FILE.fullmatch(path.name)) or int(match[2]) in ranks:
                raise UserError(f"{path}: a second file of its rank, or no rank's")
            try:
                ranks[int(match[2])] = _open_rank(path)
            except UserError as error:
                problems.append(str(error))
        if not ranks:
            missing = (
                "zero_pp_rank_*_mp_rank_00_optim_states.pt, which hold the weights, are missing"
            )
            raise UserError("; ".join(problems) or f"{folder}: {missing}")
        self._ranks = [ranks[rank] for rank in sorted(ranks)]
        self._stage, count = self._ranks[0].stage, self._ranks[0].count
        self._places: dict[str, _Place] = {}
        tensors: dict[str, StoredAs] = {}
        paddings = self._ranks[0].paddings or [[0] * len(s) for s in header.content["param_shapes"]]
        lengths = []
        for group, shapes in enumerate(header.content["param_shapes"]):
            start = 0
            for (name, shape), padding in zip(shapes.items(), paddings[group], strict=True):
                length = math.prod(shape)
                self._places[name] = _Place(group, start, length)
                tensors[name] = (shape, self._ranks[0].parts[WEIGHT][group].dtype)
                start += math.ceil(length / count) if self._stage == 3 else length + padding
            lengths.append(start)
        problems += _missing(folder, ranks, count)
        problems += _wrong_lengths(ranks, lengths)
        super().__init__(
            f"ZeRO stage {self._stage}, {count} rank{'s' * (count > 1)}",
            header.content["global_steps"],
            tensors,
            self._ranks[0].groups if set(MOMENTS) <= self._ranks[0].parts.keys() else None,
            problems,
        )

    def read(self, name: str, state: str) -> Tensor:
        """See :meth:`Layout.read`."""
        group, start, length = self._places[name]
        parts = [rank.parts[state][group] for rank in self._ranks]
        values = torch.empty(length, dtype=parts[0].dtype)
        at = 0
        for part in parts:
            size = part.shape[0]
            if self._stage == 3:
                first, last = start, start + min(math.ceil(length / len(parts)), length - at)
            else:
                first, last = max(start, 0), min(start + length, size)
                start -= size  # as the next rank's part counts
            if first < last:
                values[at : at + last - first] = part.part(first, last - first)
                at += last - first
        return values


def _open_rank(path: Path) -> _Rank:
    content = TorchFile(path, STUBS).content
    with _known_layout(path):
        state = content["optimizer_state_dict"]
        if "fp32_flat_groups" in state:
            stage, masters, adamw = 3, state["fp32_flat_groups"], state["optimizer_state_dict"]
        else:
            # bf16's own optimizer, which does not tell, cuts as stage 1 does
            stage = state["zero_stage"].values[0] if "zero_stage" in state else 1
            masters, adamw = state["single_partition_of_fp32_groups"], state["base_optimizer_state"]
        if isinstance(adamw, list):  # elastic_checkpoint: moments, but not whose
            adamw = {"state": {}, "param_groups": []}
        count = state["partition_count"]
        parts = {WEIGHT: [_stored(master) for master in masters]}
        entries = [adamw["state"].get(group, {}) for group in range(len(masters))]
        for moment in MOMENTS:
            if all(moment in entry for entry in entries):
                parts[moment] = [_stored(entry[moment]) for entry in entries]
        return _Rank(
            path,
            stage,
            max(count) if isinstance(count, list) else count,
            parts,
            adamw["param_groups"],
            state.get("param_alignment_paddings"),
        )


def _missing(folder: Path, ranks: Mapping[int, _Rank], count: int) -> Iterator[str]:
    """A line on each rank whose file is not there, or that is none of so many."""
    before, _, after = OPTIM_FILE.fullmatch(ranks[min(ranks)].path.name).groups()  # type: ignore
    for rank in range(count):
        if not (path := folder / f"{before}{rank}{after}").exists():
            yield f"{path.name} of {count} ranks is missing"
    for rank in ranks:
        if rank >= count:
            yield f"{ranks[rank].path.name} is there of {count} ranks only"


def _wrong_lengths(ranks: Mapping[int, _Rank], lengths: list[int]) -> Iterator[str]:
    """A line on each part whose length is not what its group's parameters need.

    Stages 1 and 2 save the last part with padding or, for the masters, without.
    """
    stage, count, states = (first := ranks[min(ranks)]).stage, first.count, first.parts.keys()
    for rank, saved in ranks.items():
        told = (saved.stage, saved.count, saved.parts.keys(), len(saved.parts[WEIGHT]))
        if told != (stage, count, states, len(lengths)):
            yield f"{saved.path.name} is of another checkpoint than {first.path.name}"
            continue
        for state, parts in saved.parts.items():
            for group, (part, needed) in enumerate(zip(parts, lengths, strict=True)):
                padded, left = needed, needed
                if stage < 3:
                    padded = ALIGNMENT * math.ceil(needed / (ALIGNMENT * count))
                    left = min(max(needed - rank * padded, 0), padded)
                if part.shape not in ((padded,), (left,)):
                    yield (
                        f"{saved.path.name}: {state} of group {group} is {list(part.shape)}, "
                        f"not [{left}]"
                    )


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
                    with _known_layout(path):
                        stored = _stored(content["param"] if isinstance(content, dict) else content)
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
        with _known_layout(optimizer.path):
            groups = optimizer.content["param_groups"]
        super().__init__(
            "universal",
            header.content["global_steps"],
            tensors,
            groups if with_moments else None,
            problems,
        )

    def read(self, name: str, state: str) -> Tensor:
        """See :meth:`Layout.read`."""
        return self._stored[name, state].read()
