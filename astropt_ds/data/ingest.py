"""A folder of images and a table about them, into shards.

Every image is decoded once on its way in. What cannot be used is left out, counted, and listed
with its reason in ``rejected.csv`` beside the shards.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from astropt_ds.data.decode import BadImageError, decode
from astropt_ds.data.manifest import FORMAT, SPLITS, Manifest
from astropt_ds.data.shards import IMAGE_SUFFIXES, Sample, write_index, write_shard
from astropt_ds.errors import UserError

REJECTED = "rejected.csv"


@dataclass(frozen=True)
class Job:
    """What to make shards of.

    Attributes:
        images: the folder that file names are relative to.
        catalogue: a CSV or Parquet table with a row an image; every image below the folder,
            named by its path, if None.
        id_column, file_column: of the object's id and of its file.
        filter: rows to keep, as ``pandas.DataFrame.query`` reads it.
        group_column: rows that share its value go to the same split.
        samples_per_shard: images in a tar file.
        val_fraction, test_fraction: of the ids (or groups) by hash.
        min_side: smaller images are rejected; pixels.
    """

    images: Path
    output: Path
    catalogue: Path | None = None
    id_column: str = "id"
    file_column: str = "file"
    filter: str | None = None
    group_column: str | None = None
    samples_per_shard: int = 1000
    val_fraction: float = 0.01
    test_fraction: float = 0.01
    min_side: int = 16


@dataclass(frozen=True)
class Report:
    """How many images went where."""

    samples: dict[str, int]
    rejected: int


def make_shards(job: Job) -> Report:
    """Write a data set; it appears whole, or not at all.

    Raises:
        UserError: the input is not there or not usable, or the output exists or cannot be written.
    """
    _check(job)
    table = _table(job)
    partial = job.output.with_name(job.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        report = _write(job, table, partial)
        partial.rename(job.output)
    except OSError as error:
        raise UserError(f"--output {job.output}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _write(job: Job, table: pd.DataFrame, folder: Path) -> Report:
    rejected: list[tuple[str, str, str]] = []
    entries = {}
    with tqdm(total=len(table), unit="image", disable=None, desc="shards") as progress:
        for split in SPLITS:
            rows = table[table["__split__"] == split]
            shards = []
            for number, start in enumerate(range(0, len(rows), job.samples_per_shard)):
                part = rows.iloc[start : start + job.samples_per_shard]
                samples = _samples(job, part, rejected, progress)
                shards.append(write_shard(folder / f"{split}-{number:06d}.tar", samples))
            entries[split] = write_index(folder, split, shards)
    if not any(entry.samples for entry in entries.values()):
        _, file, reason = rejected[0]
        raise UserError(
            f"--images {job.images}: none of {len(table)} is usable; the first, {file}: {reason}"
        )
    Manifest(
        format=FORMAT,
        dtype="uint8",
        channels=3,
        bands=["R", "G", "B"],
        nan="none",
        splits=entries,
    ).save(folder)
    if rejected:
        with (folder / REJECTED).open("w", newline="") as output:
            csv.writer(output).writerows([("id", "file", "reason"), *rejected])
    return Report({name: entry.samples for name, entry in entries.items()}, len(rejected))


def split_of(group: str, val_fraction: float, test_fraction: float) -> str:
    """The split of an id or group: a pure function of its name, whatever else the survey holds."""
    share = int.from_bytes(hashlib.sha256(f"split/{group}".encode()).digest()[:8], "big") / 2**64
    if share < test_fraction:
        return "test"
    return "val" if share < test_fraction + val_fraction else "train"


def key_of(identifier: str) -> str:
    """An id as a WebDataset key: reversible, and free of dots and slashes."""
    return urllib.parse.quote(identifier, safe="").replace(".", "%2E")


def _check(job: Job) -> None:
    if not job.images.is_dir():
        raise UserError(f"--images {job.images}: is no folder")
    if job.output.exists():
        raise UserError(f"--output {job.output}: exists already; name a new folder")
    if job.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {job.samples_per_shard}: 1 or more would be right")
    fractions = job.val_fraction, job.test_fraction
    if min(fractions) < 0 or sum(fractions) > 1:
        raise UserError(
            f"--val-fraction {job.val_fraction} --test-fraction {job.test_fraction}: "
            "0 or more each, 1 at most together, would be right"
        )
    if job.min_side < 1:
        raise UserError(f"--min-side {job.min_side}: 1 or more would be right")
    if job.catalogue is None and (job.filter or job.group_column):
        raise UserError("--filter and --group-column need a --catalogue with columns")


def _table(job: Job) -> pd.DataFrame:
    """The rows to store: filtered, ids checked, with split, in the order of storage."""
    table = _read_catalogue(job) if job.catalogue else _list_images(job.images)
    ids = job.id_column if job.catalogue else "id"
    if job.filter:
        table = _filtered(table, job.filter)
    if table.empty:
        raise UserError(f"no images in {job.catalogue or job.images}")
    table = table.assign(__id__=table[ids].map(_text))
    doubled = table["__id__"][table["__id__"].duplicated()]
    if len(doubled):
        raise UserError(
            f"{job.catalogue}: column {ids!r} holds {len(doubled)} ids twice, "
            f"{doubled.iloc[0]!r} for one"
        )
    groups = table["__id__"]
    if job.group_column:  # a row without a group is its own
        groups = table[job.group_column].map(_text).where(table[job.group_column].notna(), groups)
    split = groups.map(lambda group: split_of(group, job.val_fraction, job.test_fraction))
    # Stored in the order of a hash: a shard is a random part of the survey, however it was sorted.
    shuffle = table["__id__"].map(lambda i: hashlib.sha256(f"order/{i}".encode()).hexdigest())
    return table.assign(__split__=split, __shuffle__=shuffle).sort_values("__shuffle__")


def _read_catalogue(job: Job) -> pd.DataFrame:
    path = job.catalogue
    assert path is not None
    try:
        parquet = path.suffix in (".parquet", ".pq")
        # ids and groups as they are written: '007' is not 7, and 64-bit ids are no floats
        text = {c: str for c in (job.id_column, job.file_column, job.group_column) if c}
        table = pd.read_parquet(path) if parquet else pd.read_csv(path, dtype=text)
    except Exception as error:  # the readers raise whatever a damaged file makes them raise
        raise UserError(
            f"--catalogue {path}: cannot be read ({' '.join(str(error).split())})"
        ) from None
    for option in ("id_column", "file_column", "group_column"):
        column = getattr(job, option)
        if column and column not in table:
            raise UserError(
                f"--{option.replace('_', '-')} {column}: {path} has no such column; "
                f"it has {', '.join(map(str, table.columns))}"
            )
    if missing := int(table[job.id_column].isna().sum()):
        raise UserError(f"{path}: column {job.id_column!r} is empty in {missing} rows")
    return table


def _filtered(table: pd.DataFrame, expression: str) -> pd.DataFrame:
    try:
        kept = table.query(expression)
    except Exception as error:  # pandas raises whatever the expression makes it raise
        reason = " ".join(str(error).split())[:120]
        columns = ", ".join(map(str, table.columns))
        raise UserError(
            f"--filter {expression!r}: {reason}; a condition on {columns} would be right"
        ) from None
    if kept.empty:
        raise UserError(f"--filter {expression!r}: keeps none of {len(table)} rows")
    return kept


def _list_images(folder: Path) -> pd.DataFrame:
    files = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES
    )
    return pd.DataFrame(
        {"id": [str(f.with_suffix("")) for f in files], "file": [str(f) for f in files]}
    )


def _samples(
    job: Job, table: pd.DataFrame, rejected: list[tuple[str, str, str]], progress: tqdm
) -> Iterator[Sample]:
    column = job.file_column if job.catalogue else "file"
    for row in table.to_dict("records"):
        progress.update()
        identifier, file = row["__id__"], _text(row[column])
        if pd.isna(row[column]):
            rejected.append((identifier, "", "has no file name"))
            continue
        try:
            data = (job.images / file).read_bytes()
            height, width = decode(data).shape[:2]
            if min(height, width) < job.min_side:
                raise BadImageError(f"is {width} x {height} pixels, smaller than {job.min_side}")
        except (OSError, BadImageError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            rejected.append((identifier, file, str(reason)))
            continue
        suffix = Path(file).suffix.lower().lstrip(".")
        labels = {str(k): _plain(v) for k, v in row.items() if not str(k).startswith("__")}
        if "id" in labels and job.id_column != "id":
            labels["catalogue_id"] = labels["id"]  # the id of a sample is what --id-column says
        labels["id"] = identifier
        yield Sample(key_of(identifier), suffix, data, labels, width, height)


def _text(value: Any) -> str:
    """An id or group as text: bytes decoded, 7.0 from a float column as 7."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _plain(value: Any) -> Any:
    """A table's cell as JSON holds it; missing and non-finite values become null."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return None if value is pd.NaT or value is pd.NA else str(value)
