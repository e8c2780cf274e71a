#!/usr/bin/env python
"""See whether the nodes of a job are fit for a run: devices, links, disks, versions.

Example: srun python tools/preflight.py --config 2100m data.path=shards run.dir=runs/2100m
"""

from __future__ import annotations

import argparse
import datetime
import os
import socket
import sys

import torch.distributed as dist

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError, one_line, run_cli
from astropt_ds.training.preflight import preflight
from astropt_ds.training.ranks import start
from astropt_ds.training.slurm import adopt_step


def main(argv: list[str]) -> None:
    adopt_step()
    options = parse(argv)
    config = load_config(options.config, options.overrides)
    local, node = (int(os.environ.get(name, "0")) for name in ("SLURM_LOCALID", "SLURM_NODEID"))
    try:
        with start(datetime.timedelta(seconds=options.timeout)) as ranks:
            tell = say if ranks.main else lambda line: None
            fit = preflight(config, ranks, local, node, options.least * 1e9, tell)
    except dist.DistError as error:  # each speaks, since they do not reach each other
        name = socket.gethostname()
        sys.exit(f"error: {name} does not reach the others: {one_line(error)}")
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
