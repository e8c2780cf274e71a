"""Turn a survey's images, and a table about them, into WebDataset shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from astropt_ds.data.parallel import usable_cpus
from astropt_ds.data.rejected import REJECTED
from astropt_ds.errors import run_cli
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from astropt_ds.ingest.options import add_survey_options


def main(arguments: list[str]) -> None:
    # What is not given is left to the job's own defaults.
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument

    group = parser.add_argument_group("images, one of")
    group.add_argument("--images", type=Path, metavar="DIR", help="JPEG and PNG files")
    group.add_argument("--parquet", type=Path, nargs="+", metavar="PATH", help="files or folders")
    group.add_argument("--hdf5", type=Path, nargs="+", metavar="PATH", help="files or folders")
    group.add_argument("--fits", type=Path, metavar="DIR", help="FITS images")

    add("--output", type=Path, required=True, help="new folder for the shards")
    add_survey_options(parser)
    add("--columns", nargs="+", help="labels to keep (all)")

    group = parser.add_argument_group("splits, by id if nothing else is said")
    group.add_argument("--group-column", help="rows of a group go to the same split")
    group.add_argument("--split-column", help="holds train, val or test")
    group.add_argument("--healpix-order", type=int, help="tiles of the sky go to one split each")
    group.add_argument("--ra-column", help="degrees (ra)")
    group.add_argument("--dec-column", help="degrees (dec)")
    group.add_argument("--val-fraction", type=float, help="by hash (0.01)")
    group.add_argument("--test-fraction", type=float, help="by hash (0.01)")

    add("--samples-per-shard", type=int, help="images in a tar file (1000)")
    add("--min-side", type=int, help="reject smaller images; pixels (16)")
    cpus = usable_cpus()
    add("--processes", type=int, default=cpus, help=f"one a CPU ({cpus})")

    given = vars(parser.parse_args(arguments))
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    job = Job(**options)
    report = make_shards(job)
    counts = ", ".join(f"{n} {split}" for split, n in report.samples.items())
    print(f"{job.output}: {counts} (split {report.splits})")
    if not report.samples["val"]:
        print("warning: split 'val' is empty and training needs one; try a larger --val-fraction")
    if report.rejected:
        print(f"{report.rejected} images left out; reasons in {job.output / REJECTED}")


if __name__ == "__main__":
    run_cli(main)
