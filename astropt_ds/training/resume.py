"""Where a run starts: at a checkpoint that verifies and fits, or at the beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from astropt_ds.config import Config, ScheduleConfig
from astropt_ds.errors import UserError
from astropt_ds.schedule import first_change, lr_factor
from astropt_ds.training import checkpoint
from astropt_ds.training.ranks import Ranks

SHARDS = "shards"


def find_start(config: Config, run_dir: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The checkpoint to start from, if any, and a line on each newer one passed over. Collective.

    Raises:
        UserError: a resume was asked for and nothing verifies, or it would go back in a folder.
    """
    wanted = config.run.resume
    if wanted == "never":
        return None, []
    source = run_dir if wanted == "auto" else Path(wanted)
    found, passed_over = checkpoint.find(source, ranks)
    if found is None and not passed_over and wanted == "auto":
        with ranks.together():
            if ranks.main and (pointer := run_dir / checkpoint.POINTER).exists():
                raise UserError(
                    f"{pointer} speaks of a checkpoint and there is none; bring it back, or name "
                    "another run.dir"
                )
    elif found is None:
        raise UserError(
            f"run.resume={wanted}: no checkpoint verifies below {source}"
            + "".join(f"; {line}" for line in passed_over)
        )
    elif wanted != "auto":
        with ranks.together():
            _check_no_newer(found, run_dir)
    return found, passed_over


def identity(config: Config, data_hash: str) -> dict[str, Any]:
    """What a resumed run must have in common with the one that wrote the checkpoint."""
    return {
        **{f"model.{key}": value for key, value in config.model.architecture().items()},
        "seed": config.seed,
        "batch.global_images": config.batch.global_images,
        "data.image_size": config.data.image_size,
        "data.window": config.data.window,
        "data.augment": config.data.augment,
        SHARDS: data_hash,
    }


def check_fits(path: Path, manifest: dict[str, Any], config: Config, data_hash: str) -> None:
    """See that a checkpoint is of this run, and not beyond its end.

    Raises:
        UserError: it is not.
    """
    for key, now in identity(config, data_hash).items():
        then = manifest["state"]["identity"].get(key)
        if then != now and key == SHARDS:
            raise UserError(
                f"{path} was made from other images, sources or weights than data.path or "
                "data.sources name now: keep those, or name another run.dir"
            )
        if then != now:
            raise UserError(
                f"{path} was made with {key}={then}; this run has {now}: keep the old value, or "
                "name another run.dir"
            )
    if manifest["step"] > config.run.steps:
        raise UserError(
            f"run.steps={config.run.steps}: {path} is beyond that; more steps would go on from it"
        )


def schedule_warning(manifest: dict[str, Any], config: Config) -> str | None:
    """A line, where the learning rate so far would have been another under the schedule of now."""
    before = ScheduleConfig.model_validate(manifest["state"]["config"]["schedule"])
    updates = manifest["state"]["engine"]["updates"]
    changed = first_change(before, config.schedule, updates)
    if changed is None:
        return None
    then, now = (lr_factor(updates, schedule) for schedule in (before, config.schedule))
    return (
        f"warning: the schedule was another one from update {changed} on; at update {updates} "
        f"its factor jumps from {then:.4g} to {now:.4g}"
    )


def _check_no_newer(found: Path, run_dir: Path) -> None:
    """Going back in a folder would leave two branches of one run in it."""
    step = checkpoint.read_manifest(found)["step"]
    newer = [p for p in checkpoint.candidates(run_dir) if p.name > f"step-{step:08d}"]
    if newer:
        raise UserError(
            f"run.resume={found}: run.dir={run_dir} holds the newer {newer[0].name}; "
            "name another run.dir"
        )
