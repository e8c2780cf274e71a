#!/usr/bin/env python
"""Measure what this package claims: ratios, side by side in one run.

Example: python tools/benchmark.py data --images stamps --against astropt --json data.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from astropt_ds.benchmark.data import measure_data, real_stamps, synthetic_stamps
from astropt_ds.benchmark.startup import measure_startup
from astropt_ds.errors import UserError, run_cli


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["data"], help="data: into shards, verified, loaded")
    parser.add_argument("--images", type=Path, help="a folder of 512-pixel JPEG stamps, too")
    parser.add_argument("--count", type=int, default=200, help="of synthetic stamps (200)")
    parser.add_argument("--against", choices=["astropt"], help="AstroPT's own path beside ours")
    parser.add_argument("--rounds", type=int, default=5, help="in which all take turns (5)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all numbers there")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: 1 or more would be right")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    sets = [real_stamps(options.images)] if options.images else []
    sets.append(synthetic_stamps(options.count, folder))
    result: dict[str, Any] = {}
    for number, stamps in enumerate(sets):
        scratch = folder / str(number)
        scratch.mkdir()
        result[stamps.name] = measure_data(stamps, options.rounds, bool(options.against), scratch)
        show(stamps.name, result[stamps.name])
    scratch = folder / "startup"
    scratch.mkdir()
    result["startup"] = measure_startup(scratch)
    show("start-up with 10 million samples", result["startup"])
    return result


def show(title: str, result: dict[str, Any]) -> None:
    print(title)
    for name, value in result.items():
        for label, number in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"  {name:30} {label:20} {number:12,.3f}")


if __name__ == "__main__":
    run_cli(main)
