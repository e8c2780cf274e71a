"""A run: where it stands, what is due, and how it is saved, resumed, stopped and ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from astropt_ds.config import Config
from astropt_ds.data.loader import Galaxies
from astropt_ds.errors import RunAgain, UserError
from astropt_ds.training import checkpoint
from astropt_ds.training.bad_samples import BadSamples
from astropt_ds.training.energy import RunEnergy
from astropt_ds.training.engine import Engine, StepResult
from astropt_ds.training.environment import description
from astropt_ds.training.facts import training_facts
from astropt_ds.training.folder import COMPLETE, REQUEUE, RunFolder
from astropt_ds.training.initial import load_weights
from astropt_ds.training.interruption import Interruption
from astropt_ds.training.pace import GarbagePauses, Pace
from astropt_ds.training.ranks import Ranks
from astropt_ds.training.records import Records
from astropt_ds.training.resume import (
    changes,
    check_fits,
    course_warnings,
    find_start,
    identity,
    set_aside,
)
from astropt_ds.training.saves import Saves
from astropt_ds.training.step_clock import split
from astropt_ds.training.trace import Trace
from astropt_ds.training.validation import Validation
from astropt_ds.training.watchdog import Watchdog


class Run:
    """The state of a run outside the engine; all ranks have one, rank 0 writes.

    A context: whatever ends it, what is being saved is let end, and the records are closed.

    Args:
        config: the run's.
        galaxies: its data.
        interruption: what may end it early.
        ranks: its processes.

    Attributes:
        step: batches consumed.
        stopping: whether it ends before its last step, once what is due is done.

    Raises:
        UserError: the folder cannot be used.
    """

    records: Records

    def __init__(
        self, config: Config, galaxies: Galaxies, interruption: Interruption, ranks: Ranks
    ) -> None:
        self.config, self.galaxies, self.ranks = config, galaxies, ranks
        self.interruption = interruption
        self.step = 0
        self.stopping = False
        self.folder = RunFolder(config.run, ranks)
        self.dir = self.folder.path
        minutes = config.health.hang_minutes
        self.watchdog = Watchdog(self.dir / "stacks", minutes, ranks.rank, self._tell_hang)
        self.saves = Saves(config, self.dir, ranks)
        self.bad = BadSamples(config, galaxies.shard_samples)
        self.pace, self.garbage = Pace(ranks), GarbagePauses()
        self.trace = Trace(config.run.trace, self.dir / "trace", ranks)
        with ranks.together():
            self.energy = RunEnergy(config.energy, ranks)
        self._clock = time.monotonic()
        self._origin: str | None = None  # the checkpoint that the run began with
        self._init_from = config.model.init_from  # or the weights
        self._validated: int | None = None  # at which step last
        self._loss: float | None = None  # of the last step
        self._val_loss: float | None = None  # of the last validation

    # The course of a run.

    def resume(self, engine: Engine) -> None:
        """Load the checkpoint that run.resume names, if any, and open the records. Collective.

        Raises:
            UserError: a resume was asked for and nothing fits.
        """
        start = find_start(self.config, self.dir, self.ranks)
        self.watchdog.alive()
        self._origin = start.origin
        warnings = self._load(start.path, engine) if start.path else []
        if not start.path and self.config.model.init_from:
            self._load_weights(engine, Path(self.config.model.init_from))
        asked = self.galaxies.config  # which were there before auto could be settled
        self.records = Records(self.config, asked, self.dir, self.step, self.ranks)
        passed_over: list[str] = []
        with self.ranks.together():
            if self.ranks.main:
                passed_over = set_aside(start, self.dir)
                if self.step < self.config.run.steps:
                    self.folder.unmark()
        if last := self.records.last_validation:  # made after the save, perhaps
            self._validated, self._val_loss = last["step"], last["loss"]
        if used := self.records.last_energy:
            self.energy.go_on_from(used)
        for line in passed_over:
            self.event("checkpoint_passed_over", line)
        weights = self.config.model.init_from
        begins = f"starting from the weights of {weights}" if weights else "starting"
        begins = f"resuming {start.path}" if start.path else begins
        steps = f"at step {self.step} of {self.config.run.steps}"
        self.event("start", f"{begins} {steps}: {description(self.config, self.ranks)}")
        warnings += [*course_warnings(self.config), *self.folder.warnings, *self.galaxies.warnings]
        for text in warnings:
            self.event("warning", f"warning: {text}")
        self.saves.reserve(engine)
        self.trace.turn(self.step)
        self._go_on()

    def record_step(self, result: StepResult) -> None:
        """Count and record a step. Collective.

        Raises:
            UserError: too many samples failed, or the rules of ``health`` stop the run.
        """
        self.step += 1
        self.stopping = result.stop and self.step < self.config.run.steps
        self.watchdog.alive()
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self.bad.count += result.bad
        self._loss = result.loss
        record: dict[str, Any] = {
            "updates": result.updates,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "skipped": int(result.skipped is not None),
            "data_wait_s": self.galaxies.waited,
            "gc_pause_s": (gc_pause := self.garbage.take()),
            "bad_samples": self.bad.count,
        }
        if drawn := self.galaxies.drawn(self.step * self.config.batch.global_images):
            record["drawn"] = drawn
        if result.seconds:
            record |= split(result.seconds, seconds, self.galaxies.waited)
        self.records.train(self.step, seconds, record)
        self.pace.add(seconds, self.galaxies.waited, gc_pause)
        self.galaxies.waited = 0.0
        self.saves.tell_ended(self.records)
        if result.bad:
            faults = self.records.faults("bad_sample", self.step, result.faults)
            self.bad.add(faults, self.step)
        if result.skipped:
            self._tell_skipped(result)
        if self.step % self.config.health.pace_every == 0:
            self.records.pace(self.step, self.pace.compare())
            self._go_on()
        if self.trace.turn(self.step):
            self._go_on()

    def validation_due(self) -> bool:
        """Whether this step's validation is still to be made; a run that stops leaves it."""
        last = self.step == self.config.run.steps
        due = last or self.step % self.config.eval.every == 0
        return due and not self.stopping and self._validated != self.step

    def record_validation(self, validation: Validation) -> None:
        """Record a validation, its failures and its picture. Collective."""
        if self._validated is None:  # the set is fixed: its faults are told once
            self.records.faults("bad_validation_sample", self.step, validation.faults)
        self._validated, self._val_loss = self.step, validation.loss
        self.records.validation(self.step, validation, self.galaxies.grid)
        self._go_on()

    def save(self, engine: Engine) -> None:
        """Start to write what is due at this step. Collective."""
        if kinds := self.saves.due(self.step, now=self.stopping):
            validated = self._validated == self.step
            losses = {"loss": self._loss, "val_loss": self._val_loss if validated else None}
            facts = training_facts(
                self.config, self.step, engine.updates, self.galaxies.hash, losses
            )
            state = {
                "engine": engine.state(),
                "facts": facts,
                "bad_samples": self.bad.count,
                "origin": self._origin,
                "init_from": self._init_from,
                "identity": identity(self.config, self.galaxies.hash),
                "config": self.config.model_dump(mode="json"),
            }
            self.saves.start(kinds, self.step, engine, state, facts, self.records)
            if used := self.energy.total():
                self.records.note("energy", self.step, **used)
            self._go_on()

    def finish(self) -> None:
        """End the run, in success or until it is run again; the marker of that name says so.

        Raises:
            UserError: the last checkpoint could not be written, or too many samples failed.
            RunAgain: the run stopped before its last step.
        """
        if problem := self.saves.wait(self.records):
            raise UserError(
                f"{problem}: given again, the command goes on from the one before, if any"
            )
        self.energy.close()
        if used := self.energy.total():
            text = "{kwh:.3g} kWh, {kg_co2:.3g} kg of CO2 equivalent in all".format(**used)
            self.event("energy", text, **used)
        if not self.stopping:
            self.bad.check(self.step)
            text = f"complete at step {self.step}: {self.records.summary()}"
            self.event("finish", text)
            self._end(COMPLETE, text)
        else:
            text = self._tell_stop()
            self._end(REQUEUE, text)
            raise RunAgain(text)

    def event(self, name: str, text: str, **values: Any) -> None:
        """Record and show that something happened now."""
        self.records.event(name, self.step, text, **values)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.saves.close()
        self.garbage.close()
        self.energy.close()
        if hasattr(self, "records"):
            if error and not isinstance(error, RunAgain):
                self.records.note("failed", self.step, text=str(error) or repr(error))
            self.records.close(failed=error is not None)
        self.watchdog.close()
        self.folder.close()
        self.trace.close()

    # What happens at its turns.

    def _load(self, path: Path, engine: Engine) -> list[str]:
        """Overwrite the engine's state and this run's; warnings of what has changed."""
        with self.ranks.together():
            manifest = checkpoint.read_manifest(path)
            check_fits(path, manifest, self.config, self.galaxies.hash)
            checkpoint.load(path, engine.fragments())
        state = manifest["state"]
        engine.restored(state["engine"])
        self.step = manifest["step"]
        self.bad.count = state["bad_samples"]
        self._init_from = state["init_from"]
        self.saves.loaded(path, self.step)
        return changes(manifest, self.config)

    def _load_weights(self, engine: Engine, folder: Path) -> None:
        with self.ranks.together():
            load_weights(folder, self.config.model, engine.fragments(), self.ranks.main)
        engine.refresh()

    def _tell_stop(self) -> str:
        """Say what stopped the run, and how long that took."""
        asked = self.ranks.gather((self.interruption.reason, self.interruption.since))
        rank, reason, since = next((r, why, t) for r, (why, t) in enumerate(asked) if why)
        seconds = time.time() - since
        again = " with run.resume=auto" if self.config.run.resume == "never" else ""
        text = (
            f"{reason} on rank {rank}: saved at step {self.step} of {self.config.run.steps}, "
            f"{seconds:.1f} s after it; the same command{again} goes on"
        )
        self.records.note("stop", self.step, text=text, reason=reason, rank=rank, durable_s=seconds)
        return text

    def _tell_hang(self, text: str) -> None:
        if hasattr(self, "records"):
            self.records.note("hang", self.step, text=text)

    def _end(self, marker: str, text: str) -> None:
        """Leave the marker, close the records; from then on a launcher may kill whom it likes."""
        with self.ranks.together():
            if self.ranks.main:
                self.folder.mark(marker, text)
        with self.ranks.together():
            self.records.close()

    def _tell_skipped(self, result: StepResult) -> None:
        rules = self.config.health
        values = {"loss": result.loss, "grad_norm": result.grad_norm}
        text = f"update {result.updates + 1} skipped at step {self.step}: {result.skipped}"
        self.event("skipped", f"warning: {text}", **values)
        if getattr(rules, result.rule) == "stop":
            raise UserError(f"step {self.step}: {result.skipped}; health.{result.rule}=stop")
        advice = "a lower optim.lr" + " or a higher health.sigma" * (result.rule == "spike")
        if result.in_a_row >= rules.max_skipped:
            raise UserError(
                f"step {self.step}: {result.in_a_row} updates in a row were skipped, as many as "
                f"health.max_skipped allows, the last because {result.skipped}; given again, the "
                f"command meets the same batches from its last checkpoint on: {advice} may help"
            )

    def _go_on(self) -> None:
        """What was done just now is no part of the next step's time."""
        self.watchdog.alive()
        self.garbage.take()
        self._clock = time.monotonic()
