"""Stages 1, 2 and 3 in DeepSpeed 0.19's checkpoints: a file a rank, with its part of fp32 masters.

Stages 1 and 2 lay the parameters of a group end to end and cut the whole among the ranks; stage 3
cuts each parameter among the ranks and lays the shares of a group end to end. AdamW's moments lie
as the masters do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from astropt_ds.convert.torch_file import StoredTensor, TorchFile
from astropt_ds.convert.zero_layouts import STUBS, Layout, count, known_layout, stored_tensor
from astropt_ds.errors import UserError
from astropt_ds.model_folder.weights import StoredAs
from astropt_ds.training.fragments import MOMENTS, WEIGHT

OPTIM_FILES = "*_optim_states.pt"
OPTIM_FILE = re.compile(r"(.*zero_pp_rank_)(\d+)(_mp_rank_00_optim_states\.pt)")
MOST_RANKS = 2**16
LISTED = 8  # files in a line
ALIGNMENT = 2  # elements: stages 1 and 2 pad a group so that each rank's part is a multiple


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
    updates: set[int]
    paddings: list[list[int]] | None


class Partitioned(Layout):
    """Stages 1, 2 and 3, and bf16's own optimizer: a file a rank with its part of every group."""

    def __init__(self, header: TorchFile, folder: Path) -> None:
        self._folder = folder
        problems: list[str] = []
        ranks: dict[int, _Rank] = {}
        for path in sorted(folder.glob(OPTIM_FILES)):
            if not (match := OPTIM_FILE.fullmatch(path.name)) or int(match[2]) in ranks:
                raise UserError(f"{path}: a second file of its rank, or of no rank at all")
            try:
                ranks[int(match[2])] = _open_rank(path)
            except UserError as error:
                problems.append(str(error))
        if not ranks:
            missing = f"{folder}: {OPTIM_FILES}, which hold the weights, are missing"
            raise UserError("; ".join(problems) or missing)
        self._ranks = [ranks[rank] for rank in sorted(ranks)]
        self._stage, size = self._ranks[0].stage, self._ranks[0].count
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
                start += math.ceil(length / size) if self._stage == 3 else length + padding
            lengths.append(start)
        problems += _missing(folder, ranks, size)
        problems += _wrong_lengths(ranks, lengths)
        problems += _torn({saved.path.name: saved.updates for saved in self._ranks}, "AdamW's")
        step = count(header.content["global_steps"])
        problems += _torn_headers(folder)
        super().__init__(
            f"ZeRO stage {self._stage}, {size} rank{'s' * (size > 1)}",
            step,
            max(self._ranks[0].updates, default=step),
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
        if at < length:
            raise UserError(f"{self._folder}: {state} of {name} has {at} of {length} elements")
        return values


def _open_rank(path: Path) -> _Rank:
    file = TorchFile(path, STUBS)
    # torch writes a file's own name into it; "archive" where it was given none
    if file.saved_as not in (path.stem, "archive"):
        raise UserError(f"{path}: was saved as {file.saved_as}{path.suffix}; copied over another?")
    content = file.content
    with known_layout(path):
        state = content["optimizer_state_dict"]
        if "fp32_flat_groups" in state:
            stage, masters, adamw = 3, state["fp32_flat_groups"], state["optimizer_state_dict"]
        else:
            # bf16's own optimizer, which does not tell, cuts as stage 1 does
            stage = count(state["zero_stage"].values[0], 1, 2) if "zero_stage" in state else 1
            masters, adamw = state["single_partition_of_fp32_groups"], state["base_optimizer_state"]
        if isinstance(adamw, list):  # elastic_checkpoint: moments, but not whose
            adamw = {"state": {}, "param_groups": []}
        counts = state["partition_count"]  # stages 1 and 2 have one a group
        counts = counts if isinstance(counts, list) else [counts]
        parts = {WEIGHT: [stored_tensor(master) for master in masters]}
        entries = [adamw["state"].get(group, {}) for group in range(len(masters))]
        for moment in MOMENTS:
            if all(moment in entry for entry in entries):
                parts[moment] = [stored_tensor(entry[moment]) for entry in entries]
        return _Rank(
            path,
            stage,
            max(count(each, 1, MOST_RANKS) for each in counts),
            parts,
            adamw["param_groups"],
            {count(entry["step"]) for entry in entries if "step" in entry},
            state.get("param_alignment_paddings"),
        )


def _missing(folder: Path, ranks: Mapping[int, _Rank], size: int) -> Iterator[str]:
    """A line on the ranks whose files are not there, and on each that is none of so many."""
    before, _, after = OPTIM_FILE.fullmatch(ranks[min(ranks)].path.name).groups()  # type: ignore
    names = [f"{before}{rank}{after}" for rank in range(size)]
    if missing := [name for name in names if not (folder / name).exists()]:
        yield f"missing of {size} ranks: {_listed(missing)}"
    for rank in ranks:
        if rank >= size:
            yield f"{ranks[rank].path.name} is there of {size} ranks only"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _torn(steps: Mapping[str, set[int]], whose: str) -> Iterator[str]:
    """A line where files are not all of one step: a save was cut short, or a tag used again."""
    found = sorted(set().union(*steps.values()))
    if len(found) > 1:
        of = (f"{step} in {_listed([n for n in steps if step in steps[n]])}" for step in found)
        yield f"{whose} count of updates is {'; '.join(of)}: they were not saved together"


def _torn_headers(folder: Path) -> Iterator[str]:
    """The same of the files beside, of which stage 3 writes one a rank."""
    steps = {}
    for path in sorted(folder.glob("*_model_states.pt")):
        try:
            with known_layout(path):
                steps[path.name] = {count(TorchFile(path, STUBS).content["global_steps"])}
        except UserError as error:
            yield str(error)
    yield from _torn(steps, "DeepSpeed's")


def _wrong_lengths(ranks: Mapping[int, _Rank], lengths: list[int]) -> Iterator[str]:
    """A line on each part whose length is not what its group's parameters need.

    Stages 1 and 2 save the last part with padding or, for the masters, without.
    """
    stage, size, states = (first := ranks[min(ranks)]).stage, first.count, first.parts.keys()
    for rank, saved in ranks.items():
        groups = len(saved.parts[WEIGHT])
        told = (saved.stage, saved.count, saved.parts.keys(), groups)
        if told != (stage, size, states, len(first.parts[WEIGHT])):
            yield f"{saved.path.name} is of another checkpoint than {first.path.name}"
            continue
        if groups != len(lengths):
            yield f"{saved.path.name} has {groups} groups of parameters, not {len(lengths)}"
            continue
        for state, parts in saved.parts.items():
            for group, (part, needed) in enumerate(zip(parts, lengths, strict=True)):
                padded, left = needed, needed
                if stage < 3:
                    padded = ALIGNMENT * math.ceil(needed / (ALIGNMENT * size))
                    left = min(max(needed - rank * padded, 0), padded)
                if part.shape not in ((padded,), (left,)):
                    yield (
                        f"{saved.path.name}: {state} of group {group} is {list(part.shape)}, "
                        f"not [{left}]"
                    )
