"""A catalogue to a table of embeddings: what tools/embed.py does, in order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from astropt_ds.embedding.audit import finish, verdict
from astropt_ds.embedding.claims import Claims
from astropt_ds.embedding.job import EmbedJob
from astropt_ds.embedding.parts import Parts
from astropt_ds.embedding.plan import PLAN, Plan, agree
from astropt_ds.embedding.prepare import Prepared, make_embedder, open_reader, prepare
from astropt_ds.embedding.progress import Progress
from astropt_ds.embedding.task import Task
from astropt_ds.errors import RunAgain, UserError
from astropt_ds.table.manifest import TableManifest

CLAIMS = "_claims"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # that schedulers send before they kill


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
        where, reason = error.filename, error.strerror or error
        if where and not Path(where).is_relative_to(job.output):
            raise UserError(f"{where}: {reason}") from None
        raise UserError(f"--output {where or job.output}: cannot be written ({reason})") from None


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
