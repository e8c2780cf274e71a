#!/usr/bin/env python
"""See whether a run can be, before it is queued: its configuration, data, batch and memory.

Example: python tools/check_run.py --ranks 32 --config 2100m data.path=shards run.dir=runs/2100m
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError, run_cli
from astropt_ds.training.check import check_run


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: 1 or more would be right")
    if options.gpu_gb is not None and not 0 < options.gpu_gb < math.inf:
        raise UserError(f"--gpu-gb {options.gpu_gb}: above 0 would be right")
    config = load_config(options.config, options.overrides)
    for line in check_run(config, options.ranks, options.gpu_gb):
        print(line)
    if options.save:
        try:
            options.save.parent.mkdir(parents=True, exist_ok=True)
            options.save.write_text(config.to_yaml())
        except OSError as error:
            raise UserError(f"--save {options.save}: {error.strerror}") from None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a preset's name or a YAML file")
    parser.add_argument("--ranks", type=int, required=True, help="processes, one a GPU")
    parser.add_argument("--gpu-gb", type=float, help="memory of each GPU (of the one here, if any)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the configuration there")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run_cli(main)
