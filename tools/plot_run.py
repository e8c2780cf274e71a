"""Draw the curves of one run or several: losses, throughput, learning rate, gradient norm."""

from __future__ import annotations

import argparse
from pathlib import Path

from astropt_ds.errors import run_cli
from astropt_ds.evaluation.curves import CURVES, plot_runs


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help=f"default for one run: RUN/{CURVES}"
    )
    options = parser.parse_args(argv)
    path, runs = plot_runs(options.runs, options.output)
    print(f"{path}: {'; '.join(map(str, runs))}")


if __name__ == "__main__":
    run_cli(main)
