"""Checkpoints that know no topology, and that are complete or absent.

A checkpoint is a folder ``step-NNNNNNNN`` with one safetensors file a rank, holding that rank's
fragments of the logical fp32 tensors (weights and AdamW's moments); ``manifest.json``: every
tensor's shape, the fragments that cover it, the files' checksums, and the run's counters; and
``complete`` with the manifest's own checksum. It is written beside its place and renamed, so that
a folder of that name is always whole; any ZeRO stage on any number of ranks reads what any other
wrote.

What a run draws at random is a function of its seed and of where it is, so that no generator's
state is part of a checkpoint.
"""

from __future__ import annotations

import json
import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open

from astropt_ds.errors import UserError
from astropt_ds.files import replace_durably, sha256_file, write_durably
from astropt_ds.training.fragments import STATES, Fragment
from astropt_ds.training.ranks import Ranks
from astropt_ds.training.staging import (
    check_cover,
    fragment_key,
    merge,
    remove_folder,
    replace_folder,
    staged,
    write_fragments,
)

MANIFEST = "manifest.json"
MARKER = "complete"  # holds the manifest's sha256, as that holds the files'
FORMAT = "astropt_ds-checkpoint-2"
POINTER = "latest"
NAME = re.compile("step-[0-9]{8,}")


def save(run_dir: Path, step: int, fragments: list[Fragment], state: dict, ranks: Ranks) -> Path:
    """Write a checkpoint of all ranks and point to it. Collective.

    Args:
        run_dir: the run's folder; the checkpoint is ``checkpoints/step-NNNNNNNN`` below it.
        step: batches consumed.
        fragments: what this rank holds; it writes what it owns.
        state: counters and whatever else a resume needs, as JSON holds it; rank 0's is kept.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: a rank could not write, or the fragments do not cover the tensors. Older
            checkpoints are as they were, and nothing else is left.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    with staged(final, ranks) as staging:
        parts = write_fragments(staging, fragments, ranks)
        with ranks.together():
            if ranks.main:
                manifest: dict[str, Any] = {
                    "format": FORMAT,
                    "step": step,
                    "state": state,
                    "files": {part["file"]: part["facts"] for part in parts},
                    "tensors": merge(parts),
                }
                check_cover(manifest["tensors"], STATES)
                write_durably(staging / MANIFEST, json.dumps(manifest))
                write_durably(staging / MARKER, sha256_file(staging / MANIFEST) + "\n")
                replace_folder(staging, final)
                replace_durably(run_dir / POINTER, final.name + "\n")
    return final


def retain(run_dir: Path, newest: int, keep: int | None, keep_every: int | None) -> list[str]:
    """Delete old checkpoints; to be called once a newer one is on the disk, by one rank.

    Args:
        run_dir: the run's folder.
        newest: the step of the one that is on the disk now.
        keep: how many whole ones stay, this one included; all if None.
        keep_every: those of steps that are multiples of it stay too.

    Returns:
        A line on each that could not be deleted.
    """
    if keep is None:
        return []
    kept = 0
    problems = []
    for path in candidates(run_dir):
        step = _step(path)
        if kept < keep:
            kept += step <= newest and _is_whole(path)
            continue
        if keep_every and step % keep_every == 0:
            continue
        try:
            remove_folder(path)
        except OSError as error:
            problems.append(f"{path}: cannot be deleted ({error})")
    return problems


def load(path: Path, fragments: list[Fragment]) -> dict[str, Any]:
    """Overwrite this rank's fragments from a verified checkpoint; returns its manifest.

    Reads the ranges this rank holds and nothing else.

    Raises:
        UserError: the checkpoint is of another model, or has holes.
    """
    manifest = read_manifest(path)
    tensors = manifest["tensors"]
    check_cover(tensors, STATES)
    wanted = {fragment.name: fragment.shape for fragment in fragments}
    for name, shape in wanted.items():
        if name not in tensors or tuple(tensors[name]["shape"]) != shape:
            found = tensors.get(name, {}).get("shape", "nothing")
            raise UserError(f"{path}: tensor {name} is {found}; the model needs {list(shape)}")
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for fragment in fragments:
            start, stop = fragment.offset, fragment.offset + fragment.values.numel()
            for offset, length, file in tensors[fragment.name]["fragments"][fragment.state]:
                low, high = max(start, offset), min(stop, offset + length)
                if low >= high:
                    continue
                if file not in files:
                    files[file] = stack.enter_context(safe_open(path / file, framework="pt"))
                key = fragment_key(fragment.state, fragment.name, offset)
                values = files[file].get_slice(key)[low - offset : high - offset]
                fragment.values[low - start : high - start].copy_(values)
    return manifest


def find(folder: Path, ranks: Ranks) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and each newer one with what is wrong. Collective.

    Args:
        folder: a run's folder, or one checkpoint.
    """
    named = NAME.fullmatch(folder.name) or (folder / MANIFEST).is_file()
    found = [folder] if named else candidates(folder)
    passed_over: list[tuple[Path, str]] = []
    for candidate in ranks.gather(found)[0]:
        problem = verify(candidate, ranks)
        if problem is None:
            return candidate, passed_over
        passed_over.append((candidate, problem))
    return None, passed_over


def candidates(run_dir: Path) -> list[Path]:
    """Checkpoints of a run by their names alone, newest first."""
    named = [p for p in (run_dir / "checkpoints").glob("step-*") if NAME.fullmatch(p.name)]
    return sorted(named, key=_step, reverse=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is none any more, and return where it is."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    path.rename(aside)
    return aside


def verify(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, or None; the ranks share the reading. Collective."""
    problem = None
    try:
        files = sorted(read_manifest(path)["files"].items())
        for name, facts in files[ranks.rank :: ranks.size]:
            if not (path / name).is_file():
                problem = f"{name} is missing"
            elif (path / name).stat().st_size != facts["bytes"]:
                problem = f"{name} has {(path / name).stat().st_size} of {facts['bytes']} bytes"
            elif sha256_file(path / name) != facts["sha256"]:
                problem = f"{name} does not match its checksum"
    except (UserError, OSError) as error:
        problem = str(error)
    return next((problem for problem in ranks.gather(problem) if problem), None)


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        UserError: there is none, or it is not one.
    """
    try:
        if (path / MARKER).read_bytes() != f"{sha256_file(path / MANIFEST)}\n".encode():
            raise UserError(f"{path / MANIFEST} does not match its checksum")
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise UserError(f"{path / MANIFEST}: format {manifest['format']!r}, not {FORMAT!r}")
        for key in ("step", "state", "files", "tensors"):
            manifest[key]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / MANIFEST}: not a checkpoint's manifest ({error!r})") from None
    return manifest


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except UserError:
        return False
    return True
