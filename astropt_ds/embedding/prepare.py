"""What is settled before a galaxy is embedded: input, model and recipe, and that they fit."""

from __future__ import annotations

import math
import platform
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch

import astropt_ds
from astropt_ds.convert.load import build, open_model
from astropt_ds.embedding.embedder import (
    Embedder,
    check_batch,
    find_device,
    find_precision,
    weights_hash,
)
from astropt_ds.embedding.galaxies import Galaxies
from astropt_ds.embedding.job import EmbedJob, open_galaxies, read_ids
from astropt_ds.embedding.plan import Plan, rows_of_a_part
from astropt_ds.embedding.reader import Reader, find_workers
from astropt_ds.embedding.recipe import Recipe, make_recipe
from astropt_ds.embedding.view import View
from astropt_ds.errors import UserError
from astropt_ds.ingest.source import state_of
from astropt_ds.model import AstroPT
from astropt_ds.model_folder.weights import DTYPES
from astropt_ds.table.formats import FORMATS
from astropt_ds.table.schema import table_schema
from astropt_ds.tokens import grid


@dataclass(frozen=True)
class Prepared:
    """All that is known before a galaxy is embedded."""

    galaxies: Galaxies
    model: AstroPT
    recipe: Recipe
    view: View
    plan: Plan
    device: torch.device
    precision: str
    workers: int
    notes: list[str]  # what a user should know


def prepare(job: EmbedJob) -> Prepared:
    """Open the input and the model, and settle what is to be made of them.

    Raises:
        UserError: one is not there, or they do not fit each other.
    """
    if job.dtype not in ("float32", "float16"):
        raise UserError(f"--dtype {job.dtype}: float32 or float16 would be right")
    if job.limit is not None and job.limit < 1:
        raise UserError(f"--limit {job.limit}: 1 or more would be right")
    device = find_device(job.device)
    precision = find_precision(job.precision, device)
    workers = find_workers(job.workers, device.type)
    check_batch(job.batch)
    source = open_model(job.model)
    ids = read_ids(job.ids) if job.ids else None
    galaxies = open_galaxies(job, ids)
    channels = source.model.images.channels
    if len(galaxies.channels) != channels:
        raise UserError(
            f"{galaxies.what}: images of {len(galaxies.channels)} channels "
            f"({' '.join(galaxies.channels)}); {job.model} reads {channels}"
        )
    model = build(source, None, torch.device("cpu"))
    config = model.config
    sides = galaxies.sides()
    side = _image_size(job, source.facts.get("image_size"), sides, model)
    whole = grid(side, config.images.patch, str(config.orientation))
    recipe = make_recipe(config, whole.tokens, job.layers, job.pooling, job.tokens)
    view = View(whole, recipe.reads, channels, galaxies.dtype, job.strict)
    rows = min(galaxies.rows, job.limit or galaxies.rows)
    facts = {
        "model": weights_hash(model),
        "model_from": job.model,
        "layers": list(recipe.layers),
        "pooling": recipe.pooling,
        "tokens": recipe.tokens,
        "image_size": side,
        "precision": precision,
        "architecture": config.architecture(),
        "data": galaxies.what,
        "software": {
            "astropt_ds": astropt_ds.__version__,
            "torch": version("torch"),
            "python": platform.python_version(),
        },
    }
    types = {name: str(kind) for name, kind in galaxies.types().items()}
    for name in recipe.columns:
        if name in types:
            raise UserError(
                f"column {name}: the table has its own of that name; --columns without it, or the "
                "catalogue's under another, would be right"
            )
    asked: dict[str, Any] = {
        "--model": facts["model"],
        "--layer": facts["layers"],
        "--pool": recipe.pooling,
        "--tokens": recipe.tokens,
        "--image-size": side,
        "--precision": precision,
        "--dtype": job.dtype,
        "--format": job.file_format,
        **_survey_asked(job.survey or {}),
        "--data": galaxies.identity,
        "--columns": types,
        "--ids": sha256("\n".join(ids).encode()).hexdigest() if ids else None,
        "--limit": job.limit,
        "galaxies": rows,
    }
    schema = table_schema({}, recipe.columns, job.dtype, facts)
    if FORMATS[job.file_format].fit(schema) != schema:
        raise UserError(f"--format {job.file_format}: has no {job.dtype}; --dtype float32 fits")
    part_rows = rows_of_a_part(rows, 4 * recipe.values)
    plan = Plan(asked, rows, part_rows, types, facts)
    known = job.image_size is not None or "image_size" in source.facts
    notes = [] if known or len(sides) == 1 else [_sizes(sides, side)]
    return Prepared(galaxies, model, recipe, view, plan, device, precision, workers, notes)


def _survey_asked(options: dict[str, Any]) -> dict[str, Any]:
    """How a survey is read, by option; its catalogue by the names, sizes and times of its files."""
    asked = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    if catalogue := options.get("catalogue"):
        files = sorted(catalogue.rglob("*")) if catalogue.is_dir() else [catalogue]
        asked["--catalogue"] = state_of(files)
    return asked


def _sizes(sides: Counter[int], size: int) -> str:
    """What a user should know of images of several sizes."""
    counts = ", ".join(f"{count} of {side}" for side, count in sides.most_common(4))
    return (
        f"warning: images have several sizes (of some looked at, {counts} pixels); their central "
        f"{size} are taken, and smaller ones left out; --image-size chooses another"
    )


def _image_size(job: EmbedJob, trained: int | None, sides: Counter[int], model: AstroPT) -> int:
    """Pixels that images are cropped to.

    Raises:
        UserError: most images are smaller, or the model cannot read so many.
    """
    patch, side = model.config.images.patch, sides.most_common(1)[0][0]
    most = math.isqrt(model.config.block_size) * patch
    size = job.image_size
    if size is None:
        size = trained or min(side // patch * patch, most)
    fits = f"a multiple of {patch} up to {min(side // patch * patch, most)} would be right"
    if size % patch or not patch <= size <= most:
        raise UserError(f"--image-size {size}: the model reads patches of {patch} pixels; {fits}")
    if size > side:
        whose = ", as the model was trained," if job.image_size is None else ""
        raise UserError(f"--image-size {size}{whose} is more than the images' {side}; {fits}")
    return size


def open_reader(ready: Prepared) -> Reader:
    """What reads the galaxies; its processes are forked."""
    return Reader(ready.galaxies, ready.view, ready.workers)


def make_embedder(job: EmbedJob, ready: Prepared) -> Embedder:
    """The model on its device; to be called after processes were forked."""
    return Embedder(
        ready.model.to(ready.device, DTYPES[ready.precision]),
        device=str(ready.device),
        precision=ready.precision,
        batch=job.batch,
        compile=job.compile,
    )
