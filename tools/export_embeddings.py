"""Write a table of embeddings in another format: one file for astropy or TOPCAT, or parts again."""

from __future__ import annotations

import argparse
from pathlib import Path

from astropt_ds.errors import run_cli
from astropt_ds.table.export import export
from astropt_ds.table.formats import FORMATS


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="TABLE", help="what tools/embed.py wrote")
    suffixes = ", ".join(form.suffix for form in FORMATS.values())
    add(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help=f"new; a file ({suffixes}), or a folder of parts, with --format",
    )
    add("--format", choices=FORMATS, help="of a folder's parts")
    add("--columns", nargs="+", help="to keep beside the id (all)")
    options = parser.parse_args(arguments)
    rows = export(options.input, options.output, options.format, options.columns)
    print(f"{options.output}: {rows:,} galaxies")


if __name__ == "__main__":
    run_cli(main, resumes=False)
