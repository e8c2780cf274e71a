"""Turn a folder of galaxy images and a table about them into WebDataset shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from astropt_ds.data.ingest import REJECTED, Job, make_shards
from astropt_ds.errors import run_cli


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the shards")
    parser.add_argument("--catalogue", type=Path, help="CSV or Parquet; else every image found")
    parser.add_argument("--id-column", default="id", help="column of the ids")
    parser.add_argument("--file-column", default="file", help="file names, relative to --images")
    parser.add_argument("--filter", help="rows to keep: 'mag_r < 19 and redshift > 0.01'")
    parser.add_argument("--group-column", help="rows of a group go to the same split")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="images in a tar file")
    parser.add_argument("--val-fraction", type=float, default=0.01, help="of the ids, by hash")
    parser.add_argument("--test-fraction", type=float, default=0.01, help="of the ids, by hash")
    parser.add_argument("--min-side", type=int, default=16, help="reject smaller images; pixels")
    job = Job(**vars(parser.parse_args(argv)))
    report = make_shards(job)
    counts = ", ".join(f"{n} {split}" for split, n in report.samples.items())
    print(f"{job.output}: {counts}")
    if not report.samples["val"]:
        print("warning: split 'val' is empty and training needs one; try a larger --val-fraction")
    if report.rejected:
        print(f"{report.rejected} images left out; reasons in {job.output / REJECTED}")


if __name__ == "__main__":
    run_cli(main)
