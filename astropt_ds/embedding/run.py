"""A catalogue to a table of embeddings: what tools/embed.py does, in order."""

from __future__ import annotations

import math
import os
import platform
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch

import astropt_ds
from astropt_ds.convert.load import build, open_model
from astropt_ds.embedding.audit import finish, verdict
from astropt_ds.embedding.claims import Claims
from astropt_ds.embedding.embedder import (
    Embedder,
    check_batch,
    find_device,
    find_precision,
    weights_hash,
)
from astropt_ds.embedding.galaxies import Galaxies
from astropt_ds.embedding.job import EmbedJob, open_galaxies, read_ids
from astropt_ds.embedding.parts import Parts
from astropt_ds.embedding.plan import PLAN, Plan, agree, rows_of_a_part
from astropt_ds.embedding.progress import Progress
from astropt_ds.embedding.reader import Reader, find_workers
from astropt_ds.embedding.recipe import Recipe, make_recipe
from astropt_ds.embedding.task import Task
from astropt_ds.embedding.view import View
from astropt_ds.errors import RunAgain, UserError
from astropt_ds.ingest.source import state_of
from astropt_ds.model import AstroPT
from astropt_ds.model_folder.weights import DTYPES
from astropt_ds.table.formats import FORMATS
from astropt_ds.table.manifest import TableManifest
from astropt_ds.table.schema import table_schema
from astropt_ds.tokens import grid

CLAIMS = "_claims"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # that schedulers send before they kill


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


def embed(job: EmbedJob, say: Callable[[str], None] = print) -> TableManifest:
    """Embed a catalogue. What is interrupted goes on when it is asked for again.

    Any number of processes may do so at once, on any machines that see the folder.

    Args:
        job: what, and how.
        say: takes what a user should know on the way, a line each.

    Returns:
        The manifest of the table.

    Raises:
        UserError: the model, the input or the output is not there, not usable, or does not fit the
            others; or the table is not what was asked for.
        RunAgain: a signal asked to stop.
    """
    ready = prepare(job)
    try:
        return _embed(job, ready, say)
    except OSError as error:
        reason = f"{error.strerror or error} {error.filename or ''}".strip()
        raise UserError(f"--output {job.output}: cannot be written ({reason})") from None


def _embed(job: EmbedJob, ready: Prepared, say: Callable[[str], None]) -> TableManifest:
    _check_folder(job)
    claims = Claims(job.output / CLAIMS)
    plan = agree(job.output, ready.plan, claims)
    parts = Parts(job.output, job.file_format)
    ranks, rank = _tasks()
    # its processes are forked before this one starts threads
    with closing(open_reader(ready)) as reader, claims, _stoppable():
        embedder = make_embedder(job, ready)
        start = plan.parts * rank // ranks
        task = Task(plan, parts, claims, reader, embedder, ready.recipe, job.dtype, start)
        if len(task.done()) < plan.parts:
            for line in (*ready.notes, _description(ready, plan)):
                say(line)
            shown = first_of_its_kind()
            with closing(Progress(plan.galaxies(task.done()), plan.rows, shown)) as progress:
                task.run(progress)
        manifest = finish(plan, parts, claims, ready.galaxies.missing)
    verdict(manifest, job.output)
    return manifest


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


def _check_folder(job: EmbedJob) -> None:
    """See that the output is new, or begun by this tool.

    Raises:
        UserError: it is something else.
    """
    folder = job.output
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is no folder; a new one would be right")
    folder.mkdir(parents=True, exist_ok=True)
    others = [name for name in os.listdir(folder) if not name.startswith(("_", "."))]
    if others and not (folder / PLAN).exists():
        raise UserError(f"--output {folder}: holds other things ({others[0]}); name a new folder")


def first_of_its_kind() -> bool:
    """Whether this task is the one whose output a person looks at: tasks of a launcher share it."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID"))


def _tasks() -> tuple[int, int]:
    """(how many tasks there are, which of them this is), as their launcher says."""
    for count, number in (
        ("WORLD_SIZE", "RANK"),
        ("SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_ID"),
        ("SLURM_NTASKS", "SLURM_PROCID"),
    ):
        if count in os.environ and number in os.environ:
            tasks = max(1, int(os.environ[count]))
            return tasks, int(os.environ[number]) % tasks
    return 1, 0


def _description(ready: Prepared, plan: Plan) -> str:
    recipe, view = ready.recipe, ready.view
    layers = ", ".join(map(str, recipe.layers))
    return (
        f"{plan.rows:,} galaxies of {ready.galaxies.what} ({plan.parts} parts): {recipe.pooling} "
        f"over the first {recipe.tokens} of {view.whole.tokens} tokens of {view.whole.side} pixels "
        f"after block {layers} (of 0 to {ready.model.config.layers - 1}), {ready.precision} on "
        f"{ready.device}"
    )


class _Stop(BaseException):
    """A signal came. No error of an image: whoever puts up with those must let it pass."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """A scheduler's signal ends the work in good order: others take over at once."""

    def stop(number: int, frame: Any) -> None:
        for signal_number in SIGNALS:
            signal.signal(signal_number, signal.SIG_IGN)
        raise _Stop(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except _Stop as stopped:
        raise RunAgain(f"{stopped}: the same command goes on from here") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
