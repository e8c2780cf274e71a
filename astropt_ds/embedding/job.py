"""What to embed, and how: the options of a command, and the input that they name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astropt_ds.config import DataConfig
from astropt_ds.data.manifest import MANIFEST
from astropt_ds.data.transfer import PIPE
from astropt_ds.embedding.columns import Beside
from astropt_ds.embedding.galaxies import Galaxies
from astropt_ds.embedding.shards import Shards
from astropt_ds.embedding.surveys import Surveys
from astropt_ds.errors import UserError
from astropt_ds.ids import text_of
from astropt_ds.ingest.catalogue import read_catalogue
from astropt_ds.ingest.fits import SUFFIXES as FITS
from astropt_ds.ingest.images import SUFFIXES as IMAGES
from astropt_ds.ingest.job import Job

# A survey's kind by the suffixes of its files.
KINDS = {"parquet": (".parquet",), "hdf5": (".hdf5", ".h5"), "fits": FITS, "images": IMAGES}
TABLES = (".csv", ".parquet", ".fits", ".vot", ".votable", ".xml")


@dataclass(frozen=True)
class EmbedJob:
    """What to embed, and how.

    Attributes:
        model: as :func:`astropt_ds.load_model` takes it.
        data: shards (a folder or a URL), or a survey's files or folders.
        output: the table's folder.
        layers, pooling, tokens: of the embeddings; the generation's own where they are not given.
        dtype: of the embeddings in the table: float32 or float16.
        file_format: of the table's parts.
        image_size: pixels that images are cropped to; if None those that the model was trained
            with or, where that is not known, those of most images.
        precision, device, batch, compile: of the computation, as :class:`Embedder` takes them.
        workers: processes that read and decode; ``auto`` goes by the processors.
        strict: decode images to their end where their centre would do.
        splits: of shards; all if empty.
        survey: how a survey is read, as tools/make_shards.py takes it; it also holds the catalogue.
        columns: to carry along.
        ids: a file that names the galaxies to embed; all if None.
        limit: embed the first so many only.
        cache, cache_gb: for shards that are remote.
    """

    model: str
    data: tuple[str, ...]
    output: Path
    layers: tuple[int | str, ...] = ()
    pooling: str | None = None
    tokens: int | str | None = None
    dtype: str = "float32"
    file_format: str = "parquet"
    image_size: int | None = None
    precision: str = "auto"
    device: str = "auto"
    batch: int | str = "auto"
    compile: bool = False
    workers: int | str = "auto"
    strict: bool = False
    splits: tuple[str, ...] = ()
    survey: dict[str, Any] | None = None
    columns: tuple[str, ...] = ()
    ids: Path | None = None
    limit: int | None = None
    cache: str | None = None
    cache_gb: float = 100.0


def open_galaxies(job: EmbedJob, ids: Sequence[str] | None = None) -> Galaxies:
    """The input that a job names.

    Args:
        job: its own.
        ids: of the galaxies to embed; all if None.

    Raises:
        UserError: there is none, or options do not go with it.
    """
    options = job.survey or {}
    first = job.data[0]
    remote = first.startswith(PIPE) or "://" in first
    if remote or (Path(first) / MANIFEST).is_file():
        if len(job.data) > 1:
            raise UserError(f"--data {first} {job.data[1]}: one data set would be right")
        for option in options:
            if option not in ("catalogue", "catalogue_id_column"):
                raise UserError(
                    f"--{option.replace('_', '-')}: {first} holds shards; it is not for these"
                )
        if remote and job.cache is None:
            raise UserError(
                f"--data {first}: is remote and needs --cache, a local folder for shards"
            )
        if not job.cache_gb > 0:
            raise UserError(f"--cache-gb {job.cache_gb:g}: above 0 would be right")
        where = DataConfig(path=first, cache=job.cache, cache_gb=job.cache_gb)
        return Shards(where, job.splits, job.columns, _beside(job), ids)
    if job.splits or job.cache:
        option = "--splits" if job.splits else "--cache"
        raise UserError(f"{option}: is for shards; {first} holds none (no {MANIFEST})")
    paths = tuple(map(Path, job.data))
    for path in paths:
        if not path.exists():
            raise UserError(f"--data {path}: is not there")
    kind = _kind(paths)
    inputs: dict[str, Any] = {kind: paths}
    if kind in ("fits", "images"):
        if len(paths) > 1 or not paths[0].is_dir():
            raise UserError(f"--data {' '.join(job.data)}: one folder of {kind} would be right")
        inputs = {kind: paths[0]}
    what = " ".join(job.data)
    try:
        return Surveys(Job(output=job.output, **inputs, **options), what, job.columns, ids)
    except UserError as error:  # which calls the input what tools/make_shards.py does
        raise UserError(str(error).replace(f"--{kind} ", "--data ")) from None


def read_ids(path: Path) -> list[str]:
    """The ids that a file names: a line each, or the column of ids of a table.

    Raises:
        UserError: it cannot be read, or names none.
    """
    if path.suffix.lower() in TABLES or path.is_dir():
        try:
            catalogue = read_catalogue(path, None, "ids", lambda column: False, ())
        except UserError as error:
            raise UserError(str(error).replace("--catalogue ", "--ids ")) from None
        ids = list(catalogue.ids)
    else:
        try:
            lines = path.read_text("utf-8-sig").splitlines()  # as Windows writes it, too
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--ids {path}: cannot be read ({reason})") from None
        ids = [text_of(line.strip()) for line in lines if line.strip()]
    if not ids:
        raise UserError(f"--ids {path}: names no galaxy; an id a line would be right")
    return ids


def _beside(job: EmbedJob) -> Beside | None:
    """The catalogue about shards, which is joined to them on the id."""
    options = job.survey or {}
    if not options.get("catalogue"):
        return None
    column = options.get("catalogue_id_column")
    path = options["catalogue"]
    catalogue = read_catalogue(path, column, "catalogue-id-column", lambda name: True, ())
    return Beside(catalogue, job.columns)


def _kind(paths: Sequence[Path]) -> str:
    """The kind that most files are of: a table may lie beside images, and a picture beside tables.

    Raises:
        UserError: none is of a known kind.
    """
    found: Counter[str] = Counter()
    for path in paths:
        names = [path.name] if path.is_file() else _names(path)
        for kind, suffixes in KINDS.items():
            found[kind] += sum(name.lower().endswith(suffixes) for name in names)
    if any(found.values()):
        return found.most_common(1)[0][0]
    known = ", ".join(suffix for suffixes in KINDS.values() for suffix in suffixes)
    raise UserError(
        f"--data {' '.join(map(str, paths))}: neither shards (no {MANIFEST}, which "
        f"tools/verify_shards.py --index makes for tar files) nor files {known}"
    )


def _names(folder: Path) -> list[str]:
    return [name for _, _, names in os.walk(folder, followlinks=True) for name in names]
