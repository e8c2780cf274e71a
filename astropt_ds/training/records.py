"""What a run writes and shows: its records, its pictures, its progress. Rank 0's affair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from astropt_ds.config import Config
from astropt_ds.data.reader import Fault
from astropt_ds.files import replace_durably
from astropt_ds.flops import utilisation
from astropt_ds.tokens import Grid
from astropt_ds.training.environment import environment
from astropt_ds.training.facts import counters, known
from astropt_ds.training.metrics import Metrics, read_metrics
from astropt_ds.training.pace import Place, stragglers
from astropt_ds.training.progress import Progress
from astropt_ds.training.ranks import Ranks
from astropt_ds.training.samples import reconstruction_picture
from astropt_ds.training.validation import Validation


class Records:
    """The records of a run; on ranks other than 0 nothing happens.

    Args:
        config: the run's.
        asked: the same as it was asked for, in which ``auto`` has not been settled.
        folder: the run's.
        step: where it starts; records beyond it are made again, and dropped.
        ranks: the run's processes.

    Attributes:
        last_validation: the last record of one that was there before, on all ranks.
        last_energy: the same of energy.
    """

    def __init__(
        self, config: Config, asked: Config, folder: Path, step: int, ranks: Ranks
    ) -> None:
        self.config, self._asked, self.folder = config, asked, folder
        self._ranks, self._writes = ranks, ranks.main
        self._places: list[Place] = []  # of the last comparison
        found: list[dict[str, Any]] = []
        with ranks.together():
            if ranks.main:
                self._start(step)
                found = read_metrics(folder)
        validations = [r for r in found if r["kind"] == "val"]
        energies = [r for r in found if r.get("event") == "energy"]
        last = [records[-1] if records else None for records in (validations, energies)]
        self.last_validation, self.last_energy = ranks.gather(last)[0]

    def _start(self, step: int) -> None:
        config, folder, ranks = self.config, self.folder, self._ranks
        self.progress = Progress(step, config.run.steps, config.tokens_per_image)
        self.metrics = Metrics(folder, step, config, self._warn)  # refuses first, if at all
        (folder / "samples").mkdir(exist_ok=True)
        if step < config.run.steps:  # else nothing runs that they would describe
            replace_durably(folder / "config.yaml", self._asked.to_yaml())
            text = json.dumps(environment(config, ranks), indent=2)
            replace_durably(folder / "environment.json", text + "\n")

    def event(self, name: str, step: int, text: str, **values: Any) -> None:
        """Record, and show, that something happened."""
        if self._writes:
            self.note(name, step, text=text, **values)
            self.progress.say(text)

    def faults(self, name: str, step: int, found: list[Fault]) -> list[Fault]:
        """Record the samples that failed on all ranks, and return them. Collective."""
        everywhere = [fault for faults in self._ranks.gather(found) for fault in faults]
        for fault in everywhere:
            text = f"bad sample {fault.shard} {fault.key}: {fault.reason}"
            self.event(name, step, text, shard=fault.shard, key=fault.key)
        return everywhere

    def pace(self, step: int, places: list[Place]) -> None:
        """Record the pace of every rank, and show who holds up the others."""
        values = {key: [getattr(place, key) for place in places] for key in Place._fields}
        self.note("pace", step, **values)
        for line in stragglers(places, self._places):
            self.event("straggler", step, line)
        self._places = places

    def note(self, name: str, step: int, **values: Any) -> None:
        """Record that something happened, without showing it."""
        if self._writes:
            self.metrics.write("event", step, event=name, **known(values))

    def summary(self) -> str:
        """How the validation loss went, in a few words; on all ranks."""
        with self._ranks.together():
            found = read_metrics(self.folder) if self._writes else []
        losses = [(r["n"], r["loss"]) for r in found if r["kind"] == "val"]
        losses = [(n, loss) for n, loss in losses if n == losses[-1][0]]  # on the same set
        losses = [(n, loss) for n, loss in losses if loss is not None]
        ends = dict.fromkeys(f"{loss:.4f}" for _, loss in (*losses[:1], *losses[-1:]))
        course = " -> ".join(ends) or "not taken here"
        return f"validation loss {course}; pictures in {self.folder / 'samples'}"

    def train(self, step: int, seconds: float, values: dict[str, Any]) -> None:
        """Record a step that took so many seconds."""
        if not self._writes:
            return
        images, tokens = self.config.batch.global_images, self.config.tokens_per_image
        rate = images * tokens / seconds
        device, size = self._ranks.device_name, self._ranks.size
        self.metrics.write(
            "train",
            step,
            **counters(self.config, step),
            **known(values),
            tokens_per_s=rate,
            **utilisation(self.config, rate, device, size),
            memory_bytes=self._ranks.peak_memory(),
        )
        self.progress.update(step, values["loss"], values["lr"], images, seconds)

    def validation(self, step: int, found: Validation, grid: Grid) -> None:
        """Record a validation and draw its picture."""
        if not self._writes:
            return
        scores = {"loss": found.loss, "n": found.n}
        baselines = {"loss_zeros": found.zeros, "loss_previous": found.previous}
        values = known({**scores, **baselines})
        self.metrics.write("val", step, **counters(self.config, step), **values)
        self.progress.say(
            f"step {step}: validation loss {found.loss:.4f} on {found.n} images "
            f"(zeros {found.zeros:.4f}, previous patch {found.previous:.4f})"
        )
        if len(found.patches):
            path = self.folder / "samples" / f"step-{step:08d}.png"
            try:
                reconstruction_picture(found.patches, found.predictions, grid).save(path)
            except OSError as error:  # a full disk; the run is worth more than its pictures
                self.event("picture", step, f"warning: {path} could not be written ({error})")

    def sync(self) -> None:
        """Return when all records so far are on the disk."""
        if self._writes:
            self.metrics.sync()

    def close(self, failed: bool = False) -> None:
        """Finish them; ``failed`` says how the run ended."""
        if self._writes:
            self._writes = False
            self.progress.close()
            self.metrics.close(failed)

    def _warn(self, text: str) -> None:
        self.progress.say(f"warning: {text}")
