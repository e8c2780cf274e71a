"""metrics.jsonl, one JSON object a line, and Weights & Biases on request."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from astropt_ds.config import Config
from astropt_ds.errors import UserError

METRICS = "metrics.jsonl"


class Metrics:
    """The record of a run. Made on rank 0 only.

    Args:
        folder: the run's folder.
        step: records beyond this step are dropped: a resumed run makes them again.
        config: the run's.
    """

    def __init__(self, folder: Path, step: int, config: Config) -> None:
        self._wandb = _start_wandb(folder, config)
        path = folder / METRICS
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        partial = path.with_name(METRICS + ".partial")
        partial.write_text("".join(f"{line}\n" for line in kept if step > 0))
        os.replace(partial, path)
        self._file = path.open("a", buffering=1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a record; None stands for what is not known."""
        record = {"kind": kind, "step": step, **values, "time": time.time()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._wandb and kind != "event":
            numbers = {f"{kind}/{key}": v for key, v in values.items() if v is not None}
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Finish; wandb uploads what is left."""
        self._file.close()
        if self._wandb:
            self._wandb.finish()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All records of a run, in order; a line torn by a crash is left out.

    Raises:
        UserError: another line is no record.
    """
    path = Path(folder) / METRICS
    records = []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            record = json.loads(line)
            record["kind"], record["step"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: line {number} is no record of a run: {line[:40]!r}; mend or remove it"
            ) from None
        records.append(record)
    return records


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def _start_wandb(folder: Path, config: Config) -> Any:
    if config.wandb.mode == "off":
        return None
    import wandb  # slow to import, and nobody's business when off

    try:
        return wandb.init(
            project=config.wandb.project,
            mode=config.wandb.mode,
            dir=str(folder),
            name=folder.name,
            # of the folder, so that a resumed run continues the same one
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            config=config.model_dump(mode="json"),
        )
    except wandb.errors.Error as error:  # no key, no network
        reason = " ".join(str(error).split())
        raise UserError(f"wandb.mode={config.wandb.mode}: {reason}; off and offline work") from None
