"""Check shards against their manifest, or list shards that others wrote."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from astropt_ds.data.foreign import index_shards
from astropt_ds.data.manifest import SPLITS
from astropt_ds.data.parallel import usable_cpus
from astropt_ds.data.rejected import REJECTED
from astropt_ds.data.verify import verify
from astropt_ds.errors import UserError, run_cli

EXIT_FAULTS = 1
CHECKING = ("fraction", "seed", "split", "decode")
LISTING = ("output", "member", "nan", *SPLITS)


def main(argv: list[str]) -> None:
    # options that are not given are left to the defaults of the package
    parser = argparse.ArgumentParser(
        description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("data", type=Path, nargs="?", default=None, help="the data set to check")
    what.add_argument("--index", type=Path, default=None, metavar="DIR", help="list DIR/**/*.tar")
    parser.add_argument("--processes", type=int, default=usable_cpus(), help="default: all CPUs")
    check = parser.add_argument_group("checking")
    check.add_argument("--fraction", type=float, help="a random share of each shard's samples")
    check.add_argument("--seed", type=int, help="of that choice; default: 0")
    check.add_argument("--split", help="only this one")
    check.add_argument("--decode", action="store_true", help="decode every image too")
    listing = parser.add_argument_group("listing, where manifest.json and the indices are written")
    listing.add_argument("--output", type=Path, metavar="DIR", help="default: beside the shards")
    listing.add_argument("--member", help="suffix of the image, where a key has several")
    listing.add_argument("--nan", choices=("reject", "zero"), help="fluxes with NaN (reject)")
    for split in SPLITS:
        listing.add_argument(f"--{split}", metavar="GLOB", help=f"the shards of {split}")
    given = vars(parser.parse_args(argv))
    data, index = given.pop("data"), given.pop("index")
    for option in CHECKING if index else LISTING:
        if option in given:
            raise UserError(f"--{option}: goes {'without' if index else 'with'} --index")
    if index:
        list_shards(index, **given)
    else:
        check_shards(data, **given)


def check_shards(data: Path, **options: Any) -> None:
    report = verify(data, **options)
    for fault in report.faults:
        print(fault)
    print(
        f"{data}: {len(report.faults) or 'no'} faults; checked {report.samples} of {report.listed} "
        f"samples in {report.shards} shards of {', '.join(report.splits)}; "
        f"{report.bytes_read:,} bytes read"
    )
    if report.faults:
        sys.exit(EXIT_FAULTS)


def list_shards(folder: Path, **options: Any) -> None:
    globs = {split: options.pop(split) for split in SPLITS if split in options}
    keep_nan = options.pop("nan", "reject") == "zero"
    report = index_shards(folder, globs=globs, keep_nan=keep_nan, **options)
    if report.compressed:
        print(f"{report.compressed} compressed tar files passed over; unpacked to .tar they count")
    if report.damaged:
        print(*report.damaged, sep="\n")
        print(
            f"{len(report.damaged)} damaged shards, nothing is written: "
            "fetch them anew or move them away, then run this again"
        )
        sys.exit(EXIT_FAULTS)
    output = options.get("output", folder)
    if not report.named:
        print("not all names tell a split, so all are train; --train, --val and --test GLOB tell")
    print(f"{output}: {', '.join(f'{n} {split}' for split, n in report.samples.items())}")
    if not report.samples["val"]:
        print("warning: split 'val' is empty and training needs one; --val GLOB names its shards")
    if report.rejected:
        print(f"{report.rejected} samples left out; reasons in {output / REJECTED}")


if __name__ == "__main__":
    run_cli(main)
