"""Convert weights between runs, model folders, AstroPT's .pt files and DeepSpeed's checkpoints."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from astropt_ds.config_source import load_model_config
from astropt_ds.convert.find import open_source
from astropt_ds.convert.generations import PREFIXES, inexpressible
from astropt_ds.convert.source import Source
from astropt_ds.convert.write import check_expressible, write_astropt, write_model_folder
from astropt_ds.errors import UserError, run_cli
from astropt_ds.model import parameter_shapes
from astropt_ds.model_folder.release import UNKNOWN, Release
from astropt_ds.model_folder.weights import DTYPES

HUB, ASTROPT = "hub", "astropt-"
TARGETS = (HUB, *(ASTROPT + generation for generation in PREFIXES))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="X",
        help="a run's folder or checkpoint, a model folder, an AstroPT .pt file, or a checkpoint "
        "that DeepSpeed wrote; recognised by its content",
    )
    parser.add_argument("--output", type=Path, metavar="Y", help="must not exist")
    parser.add_argument(
        "--to",
        choices=TARGETS,
        default=HUB,
        help="hub: a model folder (default); or a .pt file of astropt-v1: the paper's, tokeniser "
        "relu; astropt-v2: what PyPI's astropt 2.0.9 reads, aim and affine; astropt-v3: the same "
        "for 3.0 and later",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the input's")
    card = parser.add_argument_group("for the model card of a model folder")
    card.add_argument("--license", metavar="ID", help="as the Hugging Face hub names it")
    card.add_argument(
        "--dataset", action="append", metavar="ID", help="on the hub, trained on; may be repeated"
    )
    parser.add_argument(
        "--optimizer", action="store_true", help="AdamW's state too, in fp32; .pt files only"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what the input is")
    told = parser.add_argument_group("for DeepSpeed's checkpoints, which do not tell their model")
    told.add_argument("--config", metavar="PRESET_OR_YAML", help="that has the model's section")
    told.add_argument("overrides", nargs="*", metavar="key=value", help="model.tokeniser=aim, say")
    options = parser.parse_args(argv)
    if options.overrides and not options.config:
        raise UserError(f"{options.overrides[0]}: goes with --config")
    if options.output is None and not options.dry_run:
        raise UserError("--output is missing: where to write; --dry-run does without")
    if options.to == HUB and options.output and options.output.suffix == ".pt":
        made = "a model folder is made, or with --to astropt-v1, say, a file"
        raise UserError(f"--output {options.output}: the name of a file; {made}")
    if options.to != HUB and (options.license or options.dataset):
        raise UserError("--license and --dataset: an AstroPT file has no model card; --to hub has")
    if options.optimizer and options.to == HUB:
        raise UserError("--optimizer: a model folder holds weights alone; --to astropt-v1, say")
    model = load_model_config(options.config, options.overrides) if options.config else None
    release = None
    if options.license is not None or options.dataset:
        license = UNKNOWN if options.license is None else options.license
        release = Release(license, tuple(options.dataset or ()))
    source = open_source(options.input, model)
    print(f"{options.input}: {describe(source)}")
    dtype = DTYPES[options.dtype] if options.dtype else None
    generation = options.to.removeprefix(ASTROPT)
    if options.to != HUB:
        check_expressible(source, generation, options.optimizer)
    if options.dry_run:
        return
    if options.to == HUB:
        write_model_folder(source, options.output, dtype, release)
    else:
        write_astropt(source, options.output, generation, dtype, options.optimizer)
    kind = "model folder" if options.to == HUB else options.to
    print(f"{options.output}: {kind}, {size(options.output) / 1e9:.3g} GB")


def describe(source: Source) -> str:
    """What an input is, in a line."""
    model = source.model
    parameters = sum(map(math.prod, parameter_shapes(model).values()))
    stored_as = next(name for name, dtype in DTYPES.items() if dtype == source.dtype)
    targets = [HUB, *(ASTROPT + g for g in PREFIXES if not inexpressible(model, g))]
    return (
        f"{source.what}: {parameters:,} parameters in {stored_as} "
        f"({parameters * source.dtype.itemsize / 1e9:.3g} GB), {model.layers} layers, "
        f"{model.heads} heads, width {model.width}, tokeniser {model.tokeniser}, "
        f"{model.orientation} first, {model.block_size} tokens, patches of {model.images.patch} "
        f"pixels in {model.images.channels} channels, "
        + (f"step {source.facts['step']}, " if "step" in source.facts else "")
        + ("with" if source.optim else "without")
        + f" optimizer state; can become {', '.join(targets)}"
    )


def size(path: Path) -> int:
    """Bytes of a file or of a folder's files."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    run_cli(main, resumes=False)
