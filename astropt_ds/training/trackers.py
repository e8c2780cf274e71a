"""Where the numbers of a run are mirrored on request: Weights & Biases and TensorBoard.

metrics.jsonl is the record. A mirror that cannot be started is refused like any other setting; one
that fails later is given up with a warning, and the run goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from astropt_ds.config import Config
from astropt_ds.errors import UserError


class Tracker(Protocol):
    """One mirror."""

    def log(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        """Show the numbers of a record, by name."""

    def close(self, failed: bool) -> None:
        """Finish; ``failed`` says how the run ended."""


class Trackers:
    """All mirrors that the configuration asks for.

    Args:
        folder: the run's folder.
        step: from which it goes on.
        config: the run's.
        warn: is told, in one line, of a mirror that is given up.

    Raises:
        UserError: one of them cannot be started.
    """

    def __init__(
        self, folder: Path, step: int, config: Config, warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._trackers: list[Tracker] = []
        if config.tensorboard:
            self._trackers.append(TensorBoard(folder, step))
        if config.wandb.mode != "off":
            self._trackers.append(WeightsAndBiases(folder, config))

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Mirror a record; what is no number stays in metrics.jsonl alone."""
        for tracker in list(self._trackers):
            self._attempt(tracker, lambda t: t.log(kind, step, _numbers(values)))

    def close(self, failed: bool) -> None:
        """Finish them all."""
        for tracker in list(self._trackers):
            self._attempt(tracker, lambda t: t.close(failed))

    def _attempt(self, tracker: Tracker, action: Callable[[Tracker], None]) -> None:
        try:
            action(tracker)
        except Exception as error:  # whatever becomes of a mirror, the run goes on
            self._trackers.remove(tracker)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"{type(tracker).__name__} is given up ({reason}); metrics.jsonl has all")


class TensorBoard:
    """Event files in the run's folder, below ``tensorboard``.

    Args:
        folder: the run's folder.
        step: what older event files hold beyond this step is hidden.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard=true needs tensorboard: pip install 'astropt-ds[tensorboard]' "
                "would be right"
            ) from None
        self._open = lambda: SummaryWriter(
            str(folder / "tensorboard"),
            purge_step=step + 1 if step else 0,  # step 0 has a validation, made again
        )
        self._writer: Any = None

    def log(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        """Add scalars."""
        if self._writer is None:  # only now: a run that is refused leaves no file
            self._writer = self._open()
        for name, number in numbers.items():
            self._writer.add_scalar(f"{kind}/{name}", number, step)
        self._writer.flush()  # a run that is killed lacks no step

    def close(self, failed: bool) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A wandb run, the same one whenever the run in this folder is resumed.

    Args:
        folder: the run's folder.
        config: the run's.

    Raises:
        UserError: wandb refuses, for want of a key or a network, say.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb  # slow to import, and nobody's business when off

        assert config.wandb.mode != "off"
        try:
            self._run = wandb.init(
                project=config.wandb.project,
                mode=config.wandb.mode,
                dir=str(folder),
                name=folder.name,
                # of the folder, so that a resumed run continues the same one
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(quiet=True),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"wandb.mode={config.wandb.mode}: {reason}; off and offline work"
            ) from None
        # wandb's own step only ever grows: it would drop the steps that a resumed run makes again
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        """Log the numbers with their step beside them, the axis of all charts."""
        self._run.log({f"{kind}/{name}": n for name, n in numbers.items()} | {"step": step})

    def close(self, failed: bool) -> None:
        """Upload what is left."""
        self._run.finish(exit_code=1 if failed else 0)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers by name; those of a mapping follow its own name and a slash."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found
