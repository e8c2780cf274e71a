#!/usr/bin/env python
"""Measure what this package claims: ratios, side by side in one run.

Example: python tools/benchmark.py data --images stamps --against astropt --json data.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from astropt_ds.benchmark.checkpoint import measure_checkpoint
from astropt_ds.benchmark.conversion import measure_conversion
from astropt_ds.benchmark.data import measure_data, real_stamps, synthetic_stamps
from astropt_ds.benchmark.embedding import measure_embedding
from astropt_ds.benchmark.gpu import measure_gpu
from astropt_ds.benchmark.machine import machine
from astropt_ds.benchmark.scaling import measure_scaling
from astropt_ds.benchmark.startup import measure_startup
from astropt_ds.benchmark.table import measure_table
from astropt_ds.benchmark.training import measure_training
from astropt_ds.errors import UserError, run_cli


def main(argv: list[str]) -> None:
    options = parse(argv)
    for name in ("rounds", "ranks", "batch"):
        if (value := getattr(options, name, 1)) < 1:
            raise UserError(f"--{name} {value}: 1 or more would be right")
    if options.scratch and not options.scratch.is_dir():
        raise UserError(f"--scratch {options.scratch}: is no folder")
    if options.json and (options.json.is_dir() or not os.access(options.json.parent, os.W_OK)):
        raise UserError(f"--json {options.json}: cannot be written there")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        result = options.measure(Path(folder), options)
    if options.json:
        result = {"machine": machine(), **result}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="WHAT", required=True)
    trains = commands.add_parser("train", help="steps of a training, on one CPU thread")
    trains.set_defaults(measure=measure_trains)
    trains.add_argument("--config", default="21m", help="a preset's name or a YAML file (21m)")
    trains.add_argument("--batch", type=int, default=1, help="images of a step (1)")
    scales = commands.add_parser("scale", help="several CPU ranks against one")
    scales.set_defaults(measure=measure_scales)
    scales.add_argument("--config", default="21m", help="a preset's name or a YAML file (21m)")
    gpus = commands.add_parser("gpu", help="steps on one GPU: stages, compiled, images at once")
    gpus.set_defaults(measure=measure_one_gpu)
    gpus.add_argument("--config", default="2100m", help="a preset's name or a YAML file (2100m)")
    gpus.add_argument("--minutes", type=float, default=9.0, help="that it may take (9)")
    everything = commands.add_parser("all", help="train, scale, data, checkpoint and embed")
    everything.set_defaults(measure=measure_all)
    for command in (trains, everything):
        command.add_argument("--against", choices=["astropt"], help="AstroPT's own beside ours")
    data = commands.add_parser("data", help="images into shards, verified, loaded")
    data.set_defaults(measure=measure_all_data)
    saves = commands.add_parser("checkpoint", help="saves beside the training, and not; loads")
    saves.set_defaults(measure=measure_saves)
    converts = commands.add_parser("convert", help="checkpoints to model folders and files")
    converts.set_defaults(measure=measure_converts)
    embeds = commands.add_parser("embed", help="images to embeddings")
    embeds.set_defaults(measure=measure_embeds)
    tables = commands.add_parser("table", help="tables of embeddings, written and read by id")
    tables.set_defaults(measure=measure_tables)
    tables.add_argument("--rows", type=int, default=5_000_000, help="synthetic (5,000,000)")
    places = {data: "too", embeds: "in place of synthetic ones", everything: "too"}
    for command, where in places.items():
        command.add_argument("--images", type=Path, help=f"512-pixel JPEG stamps, {where}")
    for command in (data, embeds):
        command.add_argument("--count", type=int, default=200, help="of synthetic stamps (200)")
        command.add_argument("--against", choices=["astropt"], help="AstroPT's own way beside ours")
    for command in (saves, converts):
        command.add_argument("--config", default="89m", help="a preset's name or a YAML file (89m)")
    for command in (scales, saves, converts):
        command.add_argument("--ranks", type=int, default=2, help="processes, on the CPU (2)")
    rounds_of = {trains: 10, scales: 5, data: 5, saves: 3, converts: 3, embeds: 5}
    for command, rounds in rounds_of.items():
        text = f"in which all take turns ({rounds})"
        command.add_argument("--rounds", type=int, default=rounds, help=text)
    for command in (*rounds_of, tables, gpus, everything):
        command.add_argument("--json", type=Path, metavar="OUT", help="write all numbers there")
        command.add_argument("--scratch", type=Path, help="a folder on the disk to be used")
    return parser.parse_args(argv)


def measure_trains(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    against = bool(options.against)
    result = measure_training(options.config, options.batch, options.rounds, against, folder)
    title = f"training {options.config}, {result['tokens_a_step']} tokens a step"
    show(title, result)
    return {title: result}


def measure_scales(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for stage in (1, 3):
        scratch = folder / str(stage)
        scratch.mkdir()
        keys = (f"zero.stage={stage}",)
        found = measure_scaling(options.config, options.ranks, options.rounds, scratch, *keys)
        title = f"{options.config} on {options.ranks} CPU ranks and on one, ZeRO-{stage}"
        show(title, found)
        result[title] = found
    return result


def measure_one_gpu(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return {"gpu": measure_gpu(options.config, folder, options.minutes)}  # it prints as it goes


def measure_all(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    against = ["--against", options.against] if options.against else []
    images = ["--images", str(options.images)] if options.images else []
    parts = (
        ["train", *against],
        ["train", "--config", "1m", "--batch", "4", *against],
        *(["scale"], ["data", *images, *against], ["checkpoint"], ["embed", *images, *against]),
    )
    result: dict[str, Any] = {}
    for number, argv in enumerate(parts):
        scratch = folder / str(number)
        scratch.mkdir()
        part = parse(argv)
        result |= part.measure(scratch, part)
    return result


def measure_saves(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    result = measure_checkpoint(options.config, options.ranks, options.rounds, folder)
    title = f"checkpoints of {options.config} on {options.ranks} CPU ranks"
    show(title, result)
    return {title: result}


def measure_converts(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    result = measure_conversion(options.config, options.ranks, options.rounds, folder)
    title = f"conversions of {options.config}, saved by {options.ranks} ranks under ZeRO-3"
    show(title, result)
    return {title: result}


def measure_embeds(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    images = options.images
    stamps = real_stamps(images) if images else synthetic_stamps(options.count, folder)
    scratch = folder / "embeddings"
    scratch.mkdir()
    result = measure_embedding(stamps, options.rounds, bool(options.against), scratch)
    show(stamps.name, result)
    return {stamps.name: result}


def measure_tables(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    result = measure_table(options.rows, folder)
    show("table of embeddings", result)
    return {"table": result}


def measure_all_data(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
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
            numbers = number if isinstance(number, list) else [number]
            print(f"  {name:30} {label:28} " + " ".join(f"{n:12,.3f}" for n in numbers))


if __name__ == "__main__":
    run_cli(main)
