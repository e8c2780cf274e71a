"""Embed a catalogue of galaxies: images in, a table of embeddings by object id out.

Give the same command to any number of processes, by torchrun, srun or an array of Slurm jobs: they
share the work. What was interrupted goes on when the command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from astropt_ds.embedding.estimate import estimate
from astropt_ds.embedding.job import EmbedJob
from astropt_ds.embedding.recipe import POOLINGS
from astropt_ds.embedding.run import embed, first_of_its_kind
from astropt_ds.errors import run_cli
from astropt_ds.ingest.options import add_survey_options
from astropt_ds.table.formats import FORMATS
from astropt_ds.table.manifest import FAILURES

SURVEY = (
    *("catalogue", "id_column", "catalogue_id_column", "file_column", "file_pattern"),
    *("image_column", "bands", "filter", "nan", "stretch", "rgb", "scales", "softening"),
)


def main(arguments: list[str]) -> None:
    given = vars(parse(arguments))
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    survey = {name: options.pop(name) for name in SURVEY if name in options}
    dry_run = options.pop("dry_run", False)
    job = EmbedJob(**options, survey=survey)
    if dry_run:
        for line in estimate(job):
            print(line)
        return
    if not first_of_its_kind():
        embed(job, say=lambda line: None)
        return
    manifest = embed(job)
    print(f"{job.output}: {manifest.rows:,} of {manifest.asked:,} galaxies embedded")
    for reason, count in manifest.failures.items():
        print(f"{count:,} left out: {reason}")
    if manifest.unlisted:
        where = survey["catalogue"]
        print(f"warning: {manifest.unlisted:,} galaxies are not in --catalogue {where}")
    if manifest.failures:
        print(f"each is listed in {job.output / FAILURES}")


def parse(arguments: list[str]) -> argparse.Namespace:
    # What is not given is left to the job's own defaults.
    parser = argparse.ArgumentParser(
        description=__doc__,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="M",
        help="a model folder, run, checkpoint, AstroPT .pt "
        "file, or organisation/name of the Hugging Face hub",
    )
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="D",
        help="shards (a folder or URL), a folder "
        "of images or of FITS files, Parquet or HDF5 files or folders",
    )
    add("--output", required=True, type=Path, metavar="OUT", help="the table's folder")
    add("--columns", nargs="+", help="to carry along beside ra and dec (all of a catalogue)")
    add("--ids", type=Path, metavar="FILE", help="embed these only: an id a line, or a table")
    add("--limit", type=int, metavar="N", help="embed the first N only")
    add("--dry-run", action="store_true", help="only say how many galaxies, bytes and hours")

    group = parser.add_argument_group(
        "the embedding, if nothing else is said as the model's AstroPT generation has it"
    )
    group.add_argument(
        "--layer",
        dest="layers",
        nargs="+",
        type=_number_or_name,
        metavar="L",
        help="last, middle, or blocks' numbers from 0; several give a column each",
    )
    group.add_argument(
        "--pool",
        dest="pooling",
        choices=POOLINGS,
        help="over tokens (mean); none: an embedding a patch",
    )
    group.add_argument(
        "--tokens", type=_number_or_name, metavar="N", help="from the centre, or all"
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="that images are cropped to (as the model was trained, if it tells)",
    )

    group = parser.add_argument_group("the table")
    group.add_argument(
        "--format", dest="file_format", choices=FORMATS, help="of its parts (parquet)"
    )
    group.add_argument("--dtype", choices=("float32", "float16"), help="of embeddings (float32)")

    group = parser.add_argument_group("the computation")
    group.add_argument("--device", help="auto, cpu, cuda, cuda:1, ... (auto)")
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        help="auto: bf16 on GPUs that have it (auto)",
    )
    group.add_argument("--batch", type=_number_or_name, metavar="N", help="images at once (auto)")
    group.add_argument(
        "--workers", type=_number_or_name, metavar="N", help="processes that read and decode (auto)"
    )
    group.add_argument("--compile", action="store_true", help="compile the model first")
    group.add_argument(
        "--strict",
        action="store_true",
        help="decode images to their end, also where their centre would do",
    )

    group = parser.add_argument_group("shards")
    group.add_argument("--splits", nargs="+", help="train, val or test (all)")
    group.add_argument("--cache", metavar="DIR", help="local folder for shards that are remote")
    group.add_argument("--cache-gb", type=float, metavar="GB", help="that it may hold (100)")
    add_survey_options(parser)
    return parser.parse_args(arguments)


def _number_or_name(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


if __name__ == "__main__":
    run_cli(main, alike=False)  # tasks share nothing but the table
