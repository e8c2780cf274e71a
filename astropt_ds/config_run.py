"""The configuration of a run's course: its length, and what it records, saves and survives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from astropt_ds.section import NonNegative, Positive, Section


class EvalConfig(Section):
    """Validation on a fixed set: the first ``images`` of the validation split."""

    every: Positive = 1000  # steps
    images: Positive = 3200


class CheckpointConfig(Section):
    """When the run's state is saved, the last step always, and which checkpoints stay."""

    every: Positive = 1000  # steps
    keep: Positive | None = 3  # newest ones; null keeps all
    keep_every: Positive | None = None  # those whose step is a multiple stay for good


class SnapshotConfig(Section):
    """Weights alone, as model folders, for studies of the course of a training."""

    schedule: Literal["off", "log", "even", "manual"] = "off"
    count: Annotated[int, Field(ge=2)] = 64  # log and even: with step 0 and the last
    steps: tuple[NonNegative, ...] = ()  # manual
    dtype: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _check(self) -> SnapshotConfig:
        if self.schedule == "manual" and not self.steps:
            raise ValueError("schedule=manual needs steps, for example steps=[0,100,1000]")
        if self.steps and self.schedule != "manual":
            raise ValueError(f"steps needs schedule=manual, not schedule={self.schedule}")
        return self


class HealthConfig(Section):
    """What is done about bad updates and about ranks that stand still."""

    nonfinite: Literal["skip", "stop"] = "skip"  # a loss or gradient norm that is no number
    spike: Literal["skip", "stop", "ignore"] = "skip"  # one far above those of the last steps
    sigma: Annotated[float, Field(gt=0)] = 6.0  # how far, in standard deviations
    window: Annotated[int, Field(ge=8)] = 128  # how many steps; half of them before any verdict
    max_skipped: Positive = 10  # updates skipped in a row stop the run
    hang_minutes: Annotated[float, Field(gt=0, le=25)] = 20.0  # without a step end all ranks
    pace_every: Positive = 100  # steps between comparisons of the ranks


class RunConfig(Section):
    """The run's folder, its length, and what is measured of it on request."""

    dir: str | None = None
    steps: Positive = 30_000
    resume: str = "auto"  # auto | never | the path of a checkpoint or of another run's folder
    max_hours: Annotated[float, Field(gt=0)] | None = None  # then it saves and ends
    profile: bool = False  # where the time of each step goes
    trace: tuple[Positive, Positive] | None = None  # steps to trace: from this until before that

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.trace is None:
            return self
        first, end = self.trace
        if first >= end:
            raise ValueError(f"trace=[{first},{end}] holds no step; [{first},{first + 1}] would")
        if first > self.steps:
            raise ValueError(f"trace=[{first},{end}] begins after the last of steps={self.steps}")
        if end > self.steps + 1:
            raise ValueError(
                f"trace=[{first},{end}] ends after the last of steps={self.steps}; "
                f"[{first},{self.steps + 1}] would be right"
            )
        return self


class EnergyConfig(Section):
    """Energy and CO2 of the run, measured by codecarbon."""

    country: Annotated[str, Field(pattern="^[A-Z]{3}$")] | None = None  # ISO 3166; measures if set


class WandbConfig(Section):
    """Weights & Biases; `off` never imports it."""

    mode: Literal["off", "offline", "online"] = "off"
    project: str = "astropt_ds"
