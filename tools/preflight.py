#!/usr/bin/env python
"""See whether the nodes of a job are fit for a run: devices, links, disks, versions.

Example: srun python tools/preflight.py --config 2100m data.path=shards run.dir=runs/2100m
"""

from __future__ import annotations

import argparse
import os
import socket

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError, run_cli
from astropt_ds.training.preflight import preflight
from astropt_ds.training.ranks import start
from astropt_ds.training.slurm import adopt_step


def main(argv: list[str]) -> None:
    adopt_step()
    options = parse(argv)
    config = load_config(options.config, options.overrides)
    local, node = (int(os.environ.get(name, "0")) for name in ("SLURM_LOCALID", "SLURM_NODEID"))
    try:
        with start() as ranks:
            fit = preflight(config, ranks, local, node, say if ranks.main else lambda line: None)
    except UserError as error:  # of any rank: which node it is on matters here
        raise UserError(f"{socket.gethostname()}: {error}") from None
    if not fit and ranks.main:
        raise UserError("unfit nodes, as told above")


def say(line: str) -> None:
    print(line, flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a preset's name or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run_cli(main, resumes=False, alike=False)
