#!/usr/bin/env python
"""Plan a run: what fits which GPUs, what travels between them, how long it lasts, what it costs.

Example: python tools/plan.py --config 2100m --gpus 32 --gpu h100 --price 2.5
"""

from __future__ import annotations

import argparse
import json
import math

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError, run_cli
from astropt_ds.gpus import GPUS, gpu_named
from astropt_ds.plan import UTILISATION
from astropt_ds.planner import lines, plan


def main(argv: list[str]) -> None:
    options = parse(argv)
    for name, value in (("gpus", options.gpus), ("per-node", options.per_node)):
        if value < 1:
            raise UserError(f"--{name} {value}: 1 or more would be right")
    if not 0 < options.utilisation <= 1:
        raise UserError(f"--utilisation {options.utilisation}: above 0, at most 1 would be right")
    if options.gpus > options.per_node and options.gpus % options.per_node:
        raise UserError(
            f"--gpus {options.gpus}: is no multiple of a node's {options.per_node} (--per-node)"
        )
    if options.price is not None and not 0 <= options.price < math.inf:
        raise UserError(f"--price {options.price}: 0 or more would be right")
    gpu = gpu_named(options.gpu)
    config = load_config(options.config, options.overrides)
    chosen = (options.utilisation, options.price, options.per_node)
    found = plan(config, options.gpus, gpu, *chosen)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{options.config}, {config.precision}, {config.batch.global_images} images a step")
    print("\n".join(lines(found, options.gpus, gpu)))
    print(f"At {options.utilisation:.0%} of the peak (--utilisation); energy of the boards alone.")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="a preset's name or a YAML file")
    add("--gpus", required=True, type=int, help="how many")
    add("--gpu", required=True, help=f"their kind: {', '.join(GPUS)}")
    add("--per-node", type=int, default=8, help="GPUs of a node (8)")
    add(
        "--utilisation",
        type=float,
        default=UTILISATION,
        help=f"share of the peak that is reached ({UTILISATION})",
    )
    add("--price", type=float, help="of a GPU hour")
    add("--json", action="store_true", help="print all numbers as JSON")
    add("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run_cli(main)
