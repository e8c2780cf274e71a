"""Which image of a survey goes to which shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from astropt_ds.data.manifest import SPLITS
from astropt_ds.data.rejected import Rejected
from astropt_ds.data.stretch import Stretch
from astropt_ds.errors import UserError
from astropt_ds.extras import optional
from astropt_ds.ingest import splits
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.source import FILE, ID, ROW, Facts, Row
from astropt_ds.ingest.survey import BESIDE, Survey, open_survey

SPLIT = "__split__"


class Part(NamedTuple):
    """What goes into one shard: its images, and a row about each of them."""

    name: str  # of the shard
    rows: pd.DataFrame
    labels: pd.DataFrame | None


@dataclass(frozen=True)
class Plan:
    """All that is known before an image is looked at.

    Attributes:
        survey: of the images.
        facts: what they have in common.
        stretch: to 8-bit colour, if any.
        rows: ID, FILE, ROW, SPLIT and BESIDE of each image, in the order of storage.
        rejected: images that can go to no split, and files that cannot be read.
        how: the splits were made.
    """

    survey: Survey
    facts: Facts
    stretch: Stretch | None
    rows: pd.DataFrame
    rejected: list[Rejected]
    how: str

    def shards(self, samples: int) -> Iterator[tuple[str, pd.DataFrame]]:
        """The names of the shards to be, and the rows of the images of each; so many at most."""
        for split in SPLITS:
            rows = self.rows[self.rows[SPLIT] == split]
            for number, start in enumerate(range(0, len(rows), samples)):
                yield f"{split}-{number:06d}", rows.iloc[start : start + samples]

    def parts(self, samples: int, columns: tuple[str, ...], done: set[str]) -> Iterator[Part]:
        """What goes into those shards that are not done; the columns become labels."""
        catalogue = self.survey.catalogue
        table = None if catalogue is None else catalogue.labels(columns)
        for name, rows in self.shards(samples):
            if name not in done:
                beside = rows[BESIDE].to_numpy()
                labels = None if table is None else table.iloc[beside[beside >= 0]]
                yield Part(name, rows, labels)


def make_plan(job: Job) -> Plan:
    """Look at a survey's tables, and at a few images.

    Raises:
        UserError: they are not there or not usable.
    """
    survey = open_survey(job)
    made = splits.assign(job, survey.rows, survey.about)
    rows = survey.rows.assign(**{SPLIT: made.names.astype("category")})
    rows, rejected = _usable(rows, made.lacks)
    rejected += [Rejected("", file, reason) for file, reason in survey.source.unreadable]
    facts = survey.source.facts(rows)
    if not survey.source.sequential:
        # Stored in the order of a hash: a shard is a random part of the survey, however sorted.
        order = rows[ID].map(lambda i: hashlib.sha256(f"order/{i}".encode()).hexdigest())
        rows = rows.loc[order.sort_values().index]
    rows = rows[[c for c in (ID, FILE, ROW, BESIDE, SPLIT) if c in rows]]
    return Plan(survey, facts, stretch_of(job, facts), rows, rejected, made.how)


def _usable(rows: pd.DataFrame, lacks: str) -> tuple[pd.DataFrame, list[Rejected]]:
    """The rows that have a split, and the others as what they are."""
    out = rows[rows[SPLIT].isna()]
    rejected = [
        Rejected(row[ID], place_of(row), f"has {lacks}, so no split")
        for row in out.to_dict("records")
    ]
    if len(rejected) == len(rows):
        raise UserError(f"none of {len(rows)} images is usable; the first {rejected[0].reason}")
    return rows[rows[SPLIT].notna()].copy(), rejected


def place_of(row: Row) -> str:
    """Where an image lies, for a person."""
    file = str(row[FILE] or "")
    return f"{file}, row {row[ROW]}" if ROW in row else file


def stretch_of(job: Job, facts: Facts) -> Stretch | None:
    """The stretch that a job asks for.

    Raises:
        UserError: it does not fit the images, or they are 8-bit and not colour.
    """
    if facts.dtype == "uint8":
        if job.stretch or job.nan != "reject":
            option = f"--stretch {job.stretch}" if job.stretch else f"--nan {job.nan}"
            raise UserError(f"{option}: {job.where} holds 8-bit images; it is for fluxes")
        if len(facts.bands) != 3:
            raise UserError(
                f"{job.where}: 8-bit images of {len(facts.bands)} bands; "
                f"three of them by --bands would be right: {' '.join(facts.bands)}"
            )
    if not job.stretch:
        return None
    if job.stretch == "lupton":
        optional("astropy.visualization", "--stretch lupton")
    for band in job.rgb:
        if band not in facts.bands:
            raise UserError(f"--rgb {band}: the bands are {' '.join(facts.bands)}")
    parameters: dict[str, Any] = {}
    if job.scales:
        parameters["scales"] = job.scales
    if job.softening:
        parameters["Q"] = job.softening
    red, green, blue = (facts.bands.index(band) for band in job.rgb)
    return Stretch(job.stretch, red, green, blue, **parameters)
