"""The curves of runs, of which metrics.jsonl holds the values, in one figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from astropt_ds.errors import UserError
from astropt_ds.training.metrics import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
TRAIN = ("step", "tokens", "flops", "loss", "tokens_per_s", "lr", "grad_norm", "skipped")
VAL = ("step", "tokens", "flops", "loss", "loss_zeros", "loss_previous")
COUNTERS = ("step", "tokens", "flops")  # the axes that a loss is drawn against
LABELS = {
    "step": "steps",
    "tokens": "tokens",
    "flops": "training FLOPs",
    "tokens_per_s": "throughput, tokens/s",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
}
SHOWN = 0.98  # share of the training losses that the axes hold: spikes would flatten the rest
DISTINCT = 10  # colours of matplotlib's tab10, which are told apart easily
LEGEND_CHARACTERS = 180  # that fit beside each other
BASELINE = "better baseline (zeros or previous patch)"
THIN: dict[str, Any] = {"lw": 0.6, "alpha": 0.45, "zorder": 1.5}  # below all means
POINTS: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 5.5, "mec": "white", "zorder": 3}
CROSSES: dict[str, Any] = {"ls": "none", "marker": "x", "ms": 7, "clip_on": False, "zorder": 3}


@dataclass(frozen=True)
class Curves:
    """What there is to draw of a run.

    Attributes:
        name: what the legend calls it.
        train: a row a step, with the columns TRAIN; NaN where nothing is known.
        val: a row a validation, with the columns VAL.
    """

    name: str
    train: pd.DataFrame
    val: pd.DataFrame

    @property
    def baseline(self) -> pd.Series:
        """The last loss of the better predictor that learns nothing; empty if there is none."""
        return self.val[["loss_zeros", "loss_previous"]].tail(1).min(axis=1)

    @property
    def skipped(self) -> pd.Series:
        """Whether a step's update was skipped."""
        return self.train.skipped > 0

    def __str__(self) -> str:
        counts = f"{len(self.train)} steps, {len(self.val)} validations"
        return f"{self.name}: {counts}, {self.skipped.sum()} skipped updates"


def plot_runs(folders: Sequence[Path], output: Path | None) -> tuple[Path, list[Curves]]:
    """Draw runs into one PNG.

    Args:
        folders: of the runs.
        output: the file; ``curves.png`` in the folder of a single run if None.

    Returns:
        The file and what is drawn in it.

    Raises:
        UserError: a folder holds no records of a training or is given twice, the file cannot be
            written, or matplotlib is missing.
    """
    if output is None and len(folders) > 1:
        raise UserError("--output is missing: several runs need it, for example --output runs.png")
    path = folders[0] / CURVES if output is None else output
    if path.suffix != ".png":
        raise UserError(f"--output {path}: a name that ends in .png would be right")
    runs = read_runs(folders)
    figure = draw(runs)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None
    return path, runs


def read_runs(folders: Sequence[Path]) -> list[Curves]:
    """The curves of runs, called by their folders' names, or by their paths if names are alike.

    Raises:
        UserError: a folder holds no records of a training, or is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    names = [folder.name for folder in resolved]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in resolved]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}: is given twice; once would be right")
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def draw(runs: Sequence[Curves]) -> Figure:
    """Loss against steps, tokens and FLOPs, then throughput, learning rate and gradient norm.

    Running means are over the square root of the run's number of steps, without skipped updates.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise UserError(
            "figures need matplotlib: pip install 'astropt-ds[plots]' would be right"
        ) from None
    figure = Figure(figsize=(16, 9), dpi=120, layout="constrained")
    axes = dict(zip(LABELS, figure.subplots(2, 3).flat, strict=True))
    few = len(runs) <= DISTINCT
    colours = colormaps["tab10"] if few else colormaps["turbo"].resampled(len(runs))
    for number, run in enumerate(runs):
        _draw_run(axes, run, colours(number))
    for name, axis in axes.items():
        axis.set_ylabel(LABELS[name] if name not in COUNTERS else "Huber loss")
        axis.set_xlabel(LABELS[name] if name in COUNTERS else LABELS["step"])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for counter in COUNTERS:
        axes[counter].set_ylim(_loss_limits(runs))
    # a logarithmic axis wants a value above zero; where all updates were skipped there is none
    if math.isfinite(axes["flops"].dataLim.minposx):
        axes["flops"].set_xscale("log")
    if math.isfinite(axes["grad_norm"].dataLim.minposy):
        axes["grad_norm"].set_yscale("log")
    axes["tokens"].xaxis.set_major_formatter(EngFormatter())
    axes["tokens_per_s"].yaxis.set_major_formatter(EngFormatter())
    axes["tokens_per_s"].set_ylim(bottom=0)
    axes["lr"].set_ylim(bottom=0)
    _add_legends(figure, axes, runs)
    return figure


def _read(folder: Path, name: str) -> Curves:
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"{folder}: holds no {METRICS}; the run.dir of a training would be right")
    records = read_metrics(folder)
    train = _table(path, records, "train", TRAIN)
    if train.empty:
        raise UserError(f"{path}: holds no training step; draw the run once it has made one")
    return Curves(name, train, _table(path, records, "val", VAL))


def _table(
    path: Path, records: list[dict[str, Any]], kind: str, columns: Sequence[str]
) -> pd.DataFrame:
    """The numbers in all records of a kind; None is NaN."""
    rows = [record for record in records if record.get("kind") == kind]
    for row in rows:
        for column in columns:
            if not isinstance(row.get(column, "missing"), int | float | None):
                raise UserError(
                    f"{path}: the {kind} record of step {row['step']} has no number as {column}"
                )
    return pd.DataFrame(rows, columns=list(columns), dtype=float)


def _draw_run(axes: dict[str, Axes], run: Curves, colour: Any) -> None:
    train, val = run.train, run.val
    courses = [(axes[counter], train[counter], train.loss) for counter in COUNTERS]
    courses += [(axes[name], train.step, train[name]) for name in ("tokens_per_s", "grad_norm")]
    for axis, x, y in courses:
        axis.plot(x, y, color=colour, label="training, each step", **THIN)
        mean = _running_mean(y.mask(run.skipped))
        axis.plot(x, mean, color=colour, label="training, running mean")
    for counter in COUNTERS:
        axes[counter].plot(val[counter], val.loss, color=colour, label="validation", **POINTS)
        for level in run.baseline:
            axes[counter].axhline(level, color=colour, ls="--", label=BASELINE)
    axes["lr"].plot(train.step, train.lr, color=colour)
    at = train.step[run.skipped]
    if len(at):
        # along the bottom: their norms may be no numbers
        bottom = axes["grad_norm"].get_xaxis_transform()
        zeros = [0.0] * len(at)
        marks = {"color": colour, "label": "skipped update", "transform": bottom, **CROSSES}
        axes["grad_norm"].plot(at, zeros, **marks)


def _running_mean(values: pd.Series) -> pd.Series:
    window = math.isqrt(len(values))
    return values.rolling(window, min_periods=1, center=True).mean()


def _loss_limits(runs: Sequence[Curves]) -> tuple[float, float]:
    tail = (1 - SHOWN) / 2
    parts = [(r.train.loss.quantile([tail, 1 - tail]), r.val.loss, r.baseline) for r in runs]
    values = pd.concat(chain.from_iterable(parts)).dropna()
    if values.empty:  # all updates were skipped
        return 0.0, 1.0
    margin = 0.05 * (values.max() - values.min()) or 0.05
    return values.min() - margin, values.max() + margin


def _add_legends(figure: Figure, axes: dict[str, Axes], runs: Sequence[Curves]) -> None:
    """The runs' colours on top, and below what the lines and marks are."""
    names = [run.name for run in runs]
    fit = max(1, LEGEND_CHARACTERS // (max(map(len, names)) + 8))
    courses = axes["lr"].lines
    figure.legend(courses, names, loc="outside upper center", ncols=fit, frameon=False)
    marks: dict[str, Any] = {}
    for name in ("step", "grad_norm"):
        handles, labels = axes[name].get_legend_handles_labels()
        marks.update(zip(labels, handles, strict=True))
    legend = figure.legend(marks.values(), marks, loc="outside lower center", ncols=5)
    legend.set_frame_on(False)
    for handle in filter(None, legend.legend_handles):
        handle.set(color="0.3", alpha=1)
