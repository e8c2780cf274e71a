#!/usr/bin/env python
"""See whether the nodes of a job are fit for a run: devices, links, disks, versions.

Example: srun python tools/preflight.py --config 2100m data.path=shards run.dir=runs/2100m
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError, one_line, run_cli
from astropt_ds.training.node import host_name
from astropt_ds.training.preflight import preflight
from astropt_ds.training.ranks import start
from astropt_ds.training.slurm import adopt_step


def main(argv: list[str]) -> None:
    adopt_step()
    options = parse(argv)
    config = load_config(options.config, options.overrides)
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    reads_for = int(os.environ.get("SLURM_NODEID", "0")) if first_here else None
    timeout = datetime.timedelta(seconds=options.timeout)
    try:
        with start(timeout) as ranks:
            tell = say if ranks.main else lambda line: None
            fit = preflight(config, ranks, reads_for, options.least * 1e9, timeout, tell)
    except RuntimeError as error:  # each speaks, since they do not reach each other
        sys.exit(f"error: {host_name()} does not reach the others: {one_line(error)}")
    if not fit and ranks.main:
        raise UserError("unfit nodes, as told above")


def say(line: str) -> None:
    print(line, flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a preset's name or a YAML file")
    parser.add_argument(
        "--least",
        type=float,
        default=0.0,
        metavar="GB/S",
        help="bus bandwidth that the all-reduce over all ranks must have",
    )
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="to wait for the slowest (120)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run_cli(main, resumes=False)
