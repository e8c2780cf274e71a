"""Where a run starts: at a checkpoint that verifies and fits, or at the beginning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from astropt_ds.config import Config, ScheduleConfig
from astropt_ds.errors import UserError
from astropt_ds.model_folder.config_json import CONFIG
from astropt_ds.schedule import first_change, lr_factor
from astropt_ds.training import checkpoint
from astropt_ds.training.ranks import Ranks

SHARDS = "shards"


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
        path: the checkpoint, if there is one.
        origin: the one outside the run's folder that the run began with, if it did.
        passed_over: newer ones that do not verify, with the reason of each.
    """

    path: Path | None = None
    origin: str | None = None
    passed_over: Sequence[tuple[Path, str]] = ()


def find_start(config: Config, run_dir: Path, ranks: Ranks) -> Start:
    """Find the checkpoint to start from. Collective.

    A run goes on from its own newest checkpoint; ``run.resume=PATH`` says where it begins while it
    has none, so that the same command begins it and goes on with it.

    Raises:
        UserError: nothing verifies where something should, or a run would go back in its folder.
    """
    wanted = config.run.resume
    if wanted == "never":
        return Start()
    own, passed_over = checkpoint.find(run_dir, ranks)
    origin = checkpoint.read_manifest(own)["state"]["origin"] if own else None
    outside = None if wanted == "auto" else Path(wanted).resolve()
    if outside is None or outside == run_dir.resolve() or (own and str(outside) == origin):
        if own is None and passed_over:
            raise _nothing_verifies(wanted, run_dir, passed_over)
        with ranks.together():
            if own is None and (pointer := run_dir / checkpoint.POINTER).exists():
                raise UserError(
                    f"{pointer} speaks of a checkpoint and there is none; bring it back, or name "
                    "another run.dir"
                )
        return Start(own, origin, passed_over)
    found, theirs = checkpoint.find(outside, ranks)
    if found is None:
        raise _nothing_verifies(wanted, outside, theirs)
    if (own or passed_over) and not (own and own.resolve() == found.resolve()):
        newest = own or passed_over[0][0]
        raise UserError(
            f"run.resume={wanted}: run.dir={run_dir} holds {newest.name} of its own; name another "
            "run.dir, or run.resume=auto"
        )
    return Start(found, str(outside), theirs)


def set_aside(start: Start, run_dir: Path) -> list[str]:
    """Rename what was passed over in a run's folder, and tell of each; by one rank.

    Left where they are, they would be newer than what the run is about to save.
    """
    lines = []
    for path, reason in start.passed_over:
        line = f"passed over {path}: {reason}"
        if path.resolve().is_relative_to(run_dir.resolve()):
            line += f"; renamed to {checkpoint.set_aside(path).name}"
        lines.append(line)
    return lines


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
    begun = manifest["state"]["init_from"]
    if config.model.init_from not in (None, begun):
        raise UserError(
            f"model.init_from={config.model.init_from}: {path} has weights already, begun from "
            f"{begun or 'none'}; leave it out, or name another run.dir"
        )
    if manifest["step"] > config.run.steps:
        raise UserError(
            f"run.steps={config.run.steps}: {path} is beyond that; more steps would go on from it"
        )


def changes(manifest: dict[str, Any], config: Config) -> list[str]:
    """A line on each change since the checkpoint that moves the course of the training."""
    then = manifest["state"]["config"]
    lines = [
        f"optim.{key} was {then['optim'][key]} and is {now} from here on"
        for key, now in config.model_dump(mode="json")["optim"].items()
        if then["optim"][key] != now
    ]
    if then["precision"] != config.precision:
        lines.append(f"precision was {then['precision']} and is {config.precision} from here on")
    before = ScheduleConfig.model_validate(then["schedule"])
    updates = manifest["state"]["engine"]["updates"]
    changed = first_change(before, config.schedule, updates)
    if changed is not None:
        old, new = (lr_factor(updates, schedule) for schedule in (before, config.schedule))
        lines.append(
            f"the schedule was another one from update {changed} on; at update {updates} "
            f"its factor was {old:.4g} and is {new:.4g} from here on"
        )
    return lines


def course_warnings(config: Config) -> list[str]:
    """A line on each part of the configuration that the run is too short for."""
    steps, schedule = config.run.steps, config.schedule
    found = []
    if steps <= schedule.warmup:
        found.append(f"the run ends within schedule.warmup={schedule.warmup} updates")
    elif schedule.kind != "constant" and steps < schedule.decay_until:
        found.append(
            f"run.steps={steps} ends before schedule.decay_until={schedule.decay_until}: the "
            "learning rate does not come down to its floor"
        )
    if beyond := [step for step in config.snapshot.steps if step > steps]:
        found.append(f"snapshot.steps={beyond} lie beyond run.steps={steps}: not made")
    return found


def _nothing_verifies(
    wanted: str, source: Path, passed_over: Sequence[tuple[Path, str]]
) -> UserError:
    reasons = "".join(f"; {path}: {reason}" for path, reason in passed_over)
    if (source / CONFIG).exists():
        return UserError(
            f"run.resume={wanted}: {source} holds weights alone; model.init_from={wanted} would "
            "start a new run from them"
        )
    if not passed_over:
        return UserError(f"run.resume={wanted}: there is no checkpoint in {source}")
    return UserError(
        f"run.resume={wanted}: no checkpoint verifies in {source}{reasons}; bring one back, or "
        "name another run.dir"
    )
