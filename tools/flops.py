#!/usr/bin/env python
"""Count the floating-point operations of training and embedding, exactly.

Example: python tools/flops.py --config 2100m recompute=full
"""

from __future__ import annotations

import argparse
import json

from astropt_ds.accounting import account, account_embedding
from astropt_ds.config_source import load_config, preset_names
from astropt_ds.errors import UserError, run_cli

COUNTS = ("exact", "causal", "hardware", "palm", "6nd")


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.config is None:
        ladder(options)
        return
    config = load_config(options.config, options.overrides)
    found = {"config": options.config, **account(config)}
    found["embedding"] = account_embedding(config, options.layer, options.tokens)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{options.config}: {found['parameters']:,} parameters, {found['tokens']} tokens an image"
    )
    print(f"\n{'an image':24}" + "".join(f"{part:>16}" for part in found["parts"]["forward"]))
    for phase, parts in found["parts"].items():
        print(f"  {phase:22}" + "".join(f"{count:16.4g}" for count in parts.values()))
    print(f"\n{'training':24}" + "".join(f"{name:>16}" for name in COUNTS))
    for scale, counts in found["training"].items():
        print(f"  per {scale:18}" + "".join(f"{counts[name]:16.4g}" for name in COUNTS))
    embedding = found["embedding"]
    print(
        f"\nembedding an image: {embedding['tokens']} tokens, {embedding['blocks']} blocks: "
        f"exact {embedding['exact']:.4g}, causal {embedding['causal']:.4g}"
    )


def ladder(options: argparse.Namespace) -> None:
    """Every preset in a line."""
    found = {name: account(load_config(name)) for name in preset_names()}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{'a whole run':12}{'parameters':>15}" + "".join(f"{name:>12}" for name in COUNTS))
    for name, counts in found.items():
        run = counts["training"]["run"]
        line = "".join(f"{run[count]:12.4g}" for count in COUNTS)
        print(f"{name:12}{counts['parameters']:15,}{line}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="a preset's name or a YAML file; all presets without it")
    parser.add_argument("--layer", type=_layer, default="middle", help="of the embedding (middle)")
    parser.add_argument("--tokens", type=int, help="of the embedding, from the centre on (all)")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args(argv)
    given = [*options.overrides, *(["--tokens"] if options.tokens is not None else [])]
    given += ["--layer"] if options.layer != "middle" else []
    if options.config is None and given:
        raise UserError(f"{given[0]}: needs --config")
    return options


def _layer(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


if __name__ == "__main__":
    run_cli(main)
