"""The fp32 state of a DeepSpeed engine, as fragments that know no topology.

ZeRO scatters the fp32 weights and AdamW's two moments over the ranks, in a layout that depends on
the stage and on the number of ranks. Here every rank lists what it holds of each logical tensor as
1-D views with offsets into the flattened tensor: what is written in those terms can be read back
at any stage and on any number of ranks.

DeepSpeed is not imported, but its layout is relied upon: that of deepspeed 0.19 with a client
`torch.optim.AdamW`. Each function names the attributes it reads. Whatever does not look as
expected raises a RuntimeError instead of yielding wrong bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
STATES = (WEIGHT, *MOMENTS)

# ZeRO 1 and 2: a group's parameters; the flat buffer they are views of; this rank's fp32 share.
FLAT_LAYOUT = ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups")


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one logical tensor, held in memory by this rank."""

    name: str  # as in `model.named_parameters()`
    state: str  # one of STATES
    shape: tuple[int, ...]  # of the whole logical tensor
    offset: int  # where `values` starts in the flattened logical tensor
    values: torch.Tensor  # 1-D fp32 view of the live state: writing to it changes the run
    owned: bool  # each element is owned by exactly one rank, which writes it to a checkpoint


class _Piece(NamedTuple):
    """Elements [offset, offset + length) of a parameter: [start, start + length) of `home`."""

    parameter: torch.nn.Parameter
    offset: int
    home: torch.Tensor  # the fp32 tensor that AdamW updates, hence the key of its state
    start: int
    length: int  # zero or less where this rank holds nothing of the parameter
    owned: bool = True


def fragments(engine: Any) -> list[Fragment]:
    """All that this rank holds, without padding; AdamW's state is created if it has none yet.

    The views hold until DeepSpeed moves its state (`offload_states`): list anew for each use.
    Every parameter of `engine.module` must be in the optimizer. Reads `ds_shape` (stage 3).
    """
    missing = dict(engine.module.named_parameters())
    names = {id(parameter): name for name, parameter in missing.items()}
    found = []
    for piece, tensors in _pieces_with_state(engine):
        name = names.get(id(piece.parameter))
        if name is None:
            raise RuntimeError("the optimizer holds a parameter that engine.module does not")
        missing.pop(name, None)
        shape = tuple(getattr(piece.parameter, "ds_shape", piece.parameter.shape))
        if piece.length > 0:
            for state in STATES:
                values = tensors[state].detach().view(-1).narrow(0, piece.start, piece.length)
                found.append(Fragment(name, state, shape, piece.offset, values, piece.owned))
    if missing:
        raise RuntimeError(f"parameters not found in the optimizer: {', '.join(missing)}")
    return found


def optimizer_step(engine: Any) -> int:
    """AdamW's own count of updates, 0 before the first; creates nothing."""
    steps = {int(entry["step"]) for entry in _adamw(engine).state.values() if "step" in entry}
    if len(steps) > 1:
        raise RuntimeError(f"AdamW's state entries disagree on `step`: {sorted(steps)}")
    return steps.pop() if steps else 0


def set_optimizer_step(engine: Any, step: int) -> None:
    """Set `step` in every entry of AdamW's state; entries are created where there are none yet."""
    for _, tensors in _pieces_with_state(engine):
        tensors["step"].fill_(step)


@contextmanager
def _known_layout() -> Iterator[None]:
    """Turn an attribute that is not there, or lists of unequal lengths, into a RuntimeError."""
    try:
        yield
    except (AttributeError, ValueError) as error:
        raise RuntimeError(f"DeepSpeed lays its state out in an unknown way: {error}") from error


@_known_layout()
@torch.no_grad()
def refresh(engine: Any) -> None:
    """Make the weights that the forward pass sees agree with the fp32 state. Collective.

    To be called by all ranks after `values` were overwritten, between two updates. Does what
    DeepSpeed does at the end of an update. Stages 1 and 2: `update_lp_params`. Stage 3:
    `checkpoint_event_prologue` (free every gathered copy: what is gathered is never gathered
    again), `_reassign_or_swap_out_partitioned_parameters` (fp32 into the partitions) and
    `checkpoint_event_epilogue` (gather the persistent parameters).
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.AdamW):
        return  # stage 0: the fragments are views of the parameters themselves
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()


def _adamw(engine: Any) -> torch.optim.AdamW:
    """The client's AdamW: `engine.optimizer` (stage 0) or its `optimizer` (stages 1 to 3)."""
    adamw = engine.optimizer
    if not isinstance(adamw, torch.optim.AdamW):
        adamw = getattr(adamw, "optimizer", None)
    if not isinstance(adamw, torch.optim.AdamW):
        raise RuntimeError(f"no torch.optim.AdamW found in {type(engine.optimizer).__name__}")
    return adamw


def _pieces_with_state(engine: Any) -> Iterator[tuple[_Piece, dict[str, torch.Tensor]]]:
    """Every piece with its home's STATES and `step`, created as torch.optim.Adam would.

    Also for a home that is all padding on this rank, so that `step` agrees everywhere.
    """
    adamw, step = _adamw(engine), float(optimizer_step(engine))
    for piece in _pieces(engine):
        home, entry = piece.home, adamw.state[piece.home]
        if not entry:
            on_device = adamw.defaults["fused"] or adamw.defaults["capturable"]
            device = home.device if on_device else "cpu"
            entry["step"] = torch.tensor(step, dtype=torch.float32, device=device)
            entry.update({moment: torch.zeros_like(home) for moment in MOMENTS})
        if set(entry) != {"step", *MOMENTS}:
            raise RuntimeError(f"AdamW's state has {sorted(entry)}, not step, {', '.join(MOMENTS)}")
        tensors = {"weight": home, **entry}
        for state in STATES:
            if tensors[state].dtype != torch.float32 or tensors[state].shape != home.shape:
                raise RuntimeError(f"`{state}` is not a float32 tensor of its weight's shape")
        yield piece, tensors


@_known_layout()
def _pieces(engine: Any) -> list[_Piece]:
    """A piece or more of every parameter in the optimizer, whose attributes tell the layout."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.AdamW):
        return list(_replicated_pieces(optimizer, *_place(engine.seq_data_parallel_group)))
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_partitioned_pieces(optimizer))
    if hasattr(optimizer, FLAT_LAYOUT[-1]):
        return list(_flat_pieces(optimizer))
    raise RuntimeError(
        f"{type(optimizer).__name__} is neither torch.optim.AdamW nor a ZeRO optimizer with "
        f"fp32_partitioned_groups_flat or {FLAT_LAYOUT[-1]}"
    )


def _replicated_pieces(adamw: torch.optim.AdamW, rank: int, ranks: int) -> Iterator[_Piece]:
    """Stage 0 in fp32: every rank holds all, and owns the rank-th share of each parameter."""
    for parameter in (each for group in adamw.param_groups for each in group["params"]):
        count = parameter.numel()
        cuts = (0, count * rank // ranks, count * (rank + 1) // ranks, count)
        for part, (start, end) in enumerate(pairwise(cuts)):
            yield _Piece(parameter, start, parameter, start, end - start, owned=part == 1)


def _flat_pieces(optimizer: Any) -> Iterator[_Piece]:
    """Stages 1 and 2: the parameters of a group lie in one flat buffer, cut into equal shares.

    A parameter's place is read off its storage, not off DeepSpeed's tables (`_hp_mapping` is wrong
    with round_robin_gradients): it is a view of the flat buffer in any order and alignment.
    Reads the lists of FLAT_LAYOUT and `real_dp_process_group`, each with one item a group.
    """
    groups, flats, homes = FLAT_LAYOUT
    lists = (getattr(optimizer, name) for name in (*FLAT_LAYOUT, "real_dp_process_group"))
    for parameters, flat, home, process_group in zip(*lists, strict=True):
        rank, ranks = _place(process_group)
        if home.numel() * ranks != flat.numel():
            raise RuntimeError(f"{homes} has {home.numel()} elements of {flat.numel()} / {ranks}")
        first, last = rank * home.numel(), (rank + 1) * home.numel()
        for parameter in parameters:
            if parameter.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
                raise RuntimeError(f"a parameter of {groups} is not a view of {flats}")
            begin = parameter.storage_offset() - flat.storage_offset()
            low, high = max(begin, first), min(begin + parameter.numel(), last)
            yield _Piece(parameter, low - begin, home, low - first, high - low)


def _partitioned_pieces(optimizer: Any) -> Iterator[_Piece]:
    """Stage 3: every parameter is cut into equal shares; a sub-group's shares lie end to end.

    Reads `fp16_groups` and `fp32_partitioned_groups_flat`, each with one item a sub-group, and
    each parameter's `ds_process_group`, `ds_numel` and `ds_tensor.ds_numel` (share with padding).
    """
    homes = optimizer.fp32_partitioned_groups_flat
    for parameters, home in zip(optimizer.fp16_groups, homes, strict=True):
        start = 0
        for parameter in parameters:
            share, (rank, _) = parameter.ds_tensor.ds_numel, _place(parameter.ds_process_group)
            length = min(share, parameter.ds_numel - rank * share)
            yield _Piece(parameter, rank * share, home, start, length)
            start += share
        if start != home.numel():  # swapped out to NVMe, for one
            raise RuntimeError(f"fp32_partitioned_groups_flat has {home.numel()}, not {start}")


def _place(process_group: Any) -> tuple[int, int]:
    """Rank and number of ranks in the group over which state is cut: it must be the whole job."""
    rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    if ranks != dist.get_world_size():
        raise RuntimeError(f"state is cut over {ranks} of the {dist.get_world_size()} ranks")
    return rank, ranks
