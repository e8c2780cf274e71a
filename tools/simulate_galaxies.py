#!/usr/bin/env python
"""Simulate galaxy stamps with true labels: images/*.jpg and catalogue.csv in a new folder.

Example: python tools/simulate_galaxies.py --output stamps --count 2000 --side 96
Needs GalSim: pip install 'astropt-ds[demo]'
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from astropt_ds.data.parallel import usable_cpus
from astropt_ds.data.simulate import simulate_survey
from astropt_ds.errors import run_cli


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--count", type=int, required=True, help="number of stamps")
    parser.add_argument("--side", type=int, default=128, help="pixels, 0.262 arcsec each (128)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another survey (0)")
    cpus = usable_cpus()
    parser.add_argument("--processes", type=int, default=cpus, help=f"one a CPU ({cpus})")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    output = simulate_survey(**vars(options))
    rate = options.count / (time.perf_counter() - start)
    print(f"{options.count} simulated stamps in {output} ({rate:.0f} a second)")


if __name__ == "__main__":
    run_cli(main)
