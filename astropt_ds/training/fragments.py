"""The fp32 state of a DeepSpeed engine, as fragments that know no topology.

ZeRO scatters the fp32 weights and AdamW's two moments over the ranks, in a layout that depends on
the stage and on the number of ranks. Here every rank lists what it holds of each logical tensor as
1-D views with offsets into the flattened tensor: what is written in those terms can be read back
at any stage and on any number of ranks.

DeepSpeed is not imported, but its layout is relied upon; each function names the attributes it
reads. They are those of deepspeed 0.19 with a client `torch.optim.AdamW`. Whatever does not look
as expected raises a RuntimeError instead of yielding wrong bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("weight", *MOMENTS)

# ZeRO 1 and 2: a group's parameters; the flat buffer they are views of; this rank's fp32 share.
FLAT_LAYOUTS = (
    ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    # what stage 1 becomes in bf16 with fp32 gradient accumulation (BF16_Optimizer)
    ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
)


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one logical tensor, held in memory by this rank."""

    name: str  # as in `model.named_parameters()`
    state: str  # one of STATES
    shape: tuple[int, ...]  # of the whole logical tensor
    offset: int  # where `values` starts in the flattened logical tensor
    values: torch.Tensor  # 1-D fp32 view of the live state: writing to it changes the run
    owned: bool  # exactly one rank owns each element, and writes it to a checkpoint


class _Piece(NamedTuple):
    """Where a part of a parameter lies: elements [start, start + length) of the fp32 `home`."""

    parameter: torch.nn.Parameter
    shape: tuple[int, ...]
    offset: int
    home: torch.Tensor  # the tensor that AdamW updates, hence the key of its state
    start: int
    length: int  # zero (or less) where this rank holds nothing of the parameter
    owned: bool


def fragments(engine: Any) -> list[Fragment]:
    """All that this rank holds, without padding; AdamW's state is created if it has none yet.

    The views are valid until DeepSpeed moves its state (`offload_states`): list anew for each use.
    Every parameter of `engine.module` must be trained by the optimizer.
    """
    missing = dict(engine.module.named_parameters())
    names = {id(parameter): name for name, parameter in missing.items()}
    found = []
    for piece, tensors in _pieces_with_state(engine):
        name = names.get(id(piece.parameter))
        if name is None:
            raise RuntimeError("the optimizer holds a parameter that is not in engine.module")
        missing.pop(name, None)
        if piece.length > 0:
            for state in STATES:
                values = tensors[state].detach().view(-1).narrow(0, piece.start, piece.length)
                found.append(Fragment(name, state, piece.shape, piece.offset, values, piece.owned))
    if missing:
        raise RuntimeError(f"parameters not found in the optimizer's state: {sorted(missing)}")
    return found


def optimizer_step(engine: Any) -> int:
    """AdamW's own count of updates; 0 before the first. Reads only."""
    steps = {int(entry["step"]) for entry in _adamw(engine).state.values() if "step" in entry}
    if len(steps) > 1:
        raise RuntimeError(f"AdamW's state entries disagree on `step`: {sorted(steps)}")
    return steps.pop() if steps else 0


def set_optimizer_step(engine: Any, step: int) -> None:
    """Set AdamW's `step` in every state entry; entries are created where there are none yet."""
    for _, tensors in _pieces_with_state(engine):
        tensors["step"].fill_(step)


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Make the weights that the forward pass sees agree with the fp32 state. Collective.

    To be called on all ranks after `values` were overwritten, between two optimizer steps. This is
    what DeepSpeed itself does at the end of a step: stages 1 and 2 `update_lp_params`; stage 3
    `checkpoint_event_prologue` (frees every gathered copy), `_reassign_or_swap_out_partitioned_
    parameters` (fp32 into partitions), `checkpoint_event_epilogue` (gathers persistent parameters).
    """
    optimizer = engine.optimizer
    if _is_replicated(optimizer):
        return  # the fragments are views of the parameters themselves
    if _is_partitioned(optimizer):
        optimizer.checkpoint_event_prologue()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()
    else:
        _need(optimizer, "update_lp_params")()


def _pieces_with_state(engine: Any) -> Iterator[tuple[_Piece, dict[str, torch.Tensor]]]:
    """Every piece with the tensors of its home: STATES and `step`, created where missing.

    An entry is created even for a home that is all padding, so that `step` agrees everywhere.
    """
    adamw, step = _adamw(engine), optimizer_step(engine)
    for piece in _pieces(engine):
        home, entry = piece.home, adamw.state[piece.home]
        if not entry:  # as torch.optim.Adam._init_group does, before the first step
            on_device = adamw.defaults["fused"] or adamw.defaults["capturable"]
            device = home.device if on_device else "cpu"
            entry["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
            entry.update({moment: torch.zeros_like(home).detach() for moment in MOMENTS})
        if set(entry) != {"step", *MOMENTS}:
            raise RuntimeError(f"AdamW's state has {sorted(entry)}, not step, {', '.join(MOMENTS)}")
        tensors = {"weight": home, **entry}
        for state in STATES:
            if tensors[state].dtype != torch.float32 or tensors[state].shape != home.shape:
                raise RuntimeError(f"`{state}` is not a float32 tensor of its weight's shape")
        yield piece, tensors


def _pieces(engine: Any) -> Iterator[_Piece]:
    """Pieces of every parameter in the optimizer, in the layout recognised by its attributes."""
    optimizer = engine.optimizer
    if _is_replicated(optimizer):
        yield from _replicated_pieces(optimizer, _need(engine, "seq_data_parallel_group"))
        return
    if _is_partitioned(optimizer):
        yield from _partitioned_pieces(optimizer)
        return
    for layout in FLAT_LAYOUTS:
        if hasattr(optimizer, layout[-1]):
            yield from _flat_pieces(optimizer, layout)
            return
    raise RuntimeError(
        f"{type(optimizer).__name__} is neither torch.optim.AdamW nor a ZeRO optimizer with "
        f"fp32_partitioned_groups_flat, {' or '.join(layout[-1] for layout in FLAT_LAYOUTS)}"
    )


def _replicated_pieces(optimizer: torch.optim.AdamW, group: Any) -> Iterator[_Piece]:
    """Stage 0 in fp32: every rank holds all, and owns the rank-th share of each parameter."""
    rank, ranks = _place(group)
    for param_group in optimizer.param_groups:
        for parameter in param_group["params"]:
            count = parameter.numel()
            cuts = (0, count * rank // ranks, count * (rank + 1) // ranks, count)
            for part, (start, end) in enumerate(itertools.pairwise(cuts)):
                shape, owned = tuple(parameter.shape), part == 1
                yield _Piece(parameter, shape, start, parameter, start, end - start, owned)


def _flat_pieces(optimizer: Any, layout: Sequence[str]) -> Iterator[_Piece]:
    """Stages 1 and 2: a group's parameters lie in one flat buffer, cut into equal shares of ranks.

    A parameter's place is read off its storage, not off DeepSpeed's tables (`_hp_mapping` is wrong
    with round_robin_gradients): it is a view of the flat buffer at any order and alignment.
    Reads `real_dp_process_group` and the layout's three lists, all with one item a group.
    """
    groups, flats, homes = (_need(optimizer, name) for name in layout)
    processes = _need(optimizer, "real_dp_process_group")
    for parameters, flat, home, process_group in zip(groups, flats, homes, processes, strict=True):
        rank, ranks = _place(process_group)
        if home.numel() * ranks != flat.numel():
            raise RuntimeError(f"{layout[-1]} holds {home.numel()} of {flat.numel()}/{ranks}")
        first = rank * home.numel()
        for parameter in parameters:
            if parameter.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
                raise RuntimeError(f"a parameter is not a view of its {layout[1]}")
            begin = parameter.storage_offset() - flat.storage_offset()
            low = max(begin, first)
            high = min(begin + parameter.numel(), first + home.numel())
            shape = tuple(parameter.shape)
            yield _Piece(parameter, shape, low - begin, home, low - first, high - low, True)


def _partitioned_pieces(optimizer: Any) -> Iterator[_Piece]:
    """Stage 3: every parameter is cut into equal shares; a sub-group's shares lie end to end.

    Reads `fp16_groups` and `fp32_partitioned_groups_flat` (one item a sub-group), and of each
    parameter `ds_shape`, `ds_numel`, `ds_process_group` and `ds_tensor.ds_numel` (padded share).
    """
    homes = optimizer.fp32_partitioned_groups_flat
    for parameters, home in zip(_need(optimizer, "fp16_groups"), homes, strict=True):
        start = 0
        for parameter in parameters:
            rank, _ = _place(_need(parameter, "ds_process_group"))
            share = parameter.ds_tensor.ds_numel
            offset = rank * share
            length = min(share, parameter.ds_numel - offset)
            shape = tuple(parameter.ds_shape)
            yield _Piece(parameter, shape, offset, home, start, length, True)
            start += share
        if start != home.numel():  # swapped out to NVMe, for one
            raise RuntimeError(
                f"fp32_partitioned_groups_flat holds {home.numel()} elements where {start} belong"
            )


def _is_replicated(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.AdamW)


def _is_partitioned(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _adamw(engine: Any) -> torch.optim.AdamW:
    """The client's AdamW, bare (stage 0) or as `optimizer` of DeepSpeed's (stages 1 to 3)."""
    optimizer = engine.optimizer
    adamw = optimizer if _is_replicated(optimizer) else getattr(optimizer, "optimizer", None)
    if not isinstance(adamw, torch.optim.AdamW):
        raise RuntimeError(f"no torch.optim.AdamW found in {type(optimizer).__name__}")
    return adamw


def _place(process_group: Any) -> tuple[int, int]:
    """(rank, ranks) of the group over which state is cut, which must be all ranks of the job."""
    rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    if ranks != dist.get_world_size():
        raise RuntimeError(f"state is cut over {ranks} of {dist.get_world_size()} ranks: unknown")
    return rank, ranks


def _need(holder: Any, attribute: str) -> Any:
    if not hasattr(holder, attribute):
        raise RuntimeError(f"{type(holder).__name__} has no `{attribute}`: unknown layout")
    return getattr(holder, attribute)
