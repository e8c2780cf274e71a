"""A run: where it stands, what is due, and how it is saved, resumed, stopped and ended."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from astropt_ds.config import Config
from astropt_ds.data.loader import Galaxies
from astropt_ds.data.reader import Fault
from astropt_ds.errors import RunAgain, UserError
from astropt_ds.training import checkpoint
from astropt_ds.training.bad_samples import BadSamples
from astropt_ds.training.energy import RunEnergy
from astropt_ds.training.engine import Engine, StepResult
from astropt_ds.training.environment import description
from astropt_ds.training.folder import COMPLETE, REQUEUE, RunFolder
from astropt_ds.training.initial import load_weights
from astropt_ds.training.interruption import Interruption
from astropt_ds.training.pace import GarbagePauses, Pace, stragglers
from astropt_ds.training.ranks import Ranks
from astropt_ds.training.records import Records, counters
from astropt_ds.training.resume import check_fits, find_start, identity, schedule_warning
from astropt_ds.training.saves import Saves
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
    watchdog: Watchdog

    def __init__(
        self, config: Config, galaxies: Galaxies, interruption: Interruption, ranks: Ranks
    ) -> None:
        self.config, self.galaxies, self.ranks = config, galaxies, ranks
        self.interruption = interruption
        self.step = 0
        self.stopping = False
        self.folder = RunFolder(config.run, ranks)
        self.dir = self.folder.path
        self.saves = Saves(config, self.dir, ranks)
        self.bad = BadSamples(config, galaxies.shard_samples)
        self.pace, self.garbage = Pace(ranks), GarbagePauses()
        with ranks.together():
            self.energy = RunEnergy(config.energy, ranks)
        self._clock = time.monotonic()
        self._validated: int | None = None  # at which step last
        self._loss: float | None = None  # of the last step

    # The course of a run.

    def resume(self, engine: Engine) -> None:
        """Load the checkpoint that run.resume names, if any, and open the records. Collective.

        Raises:
            UserError: a resume was asked for and nothing fits.
        """
        found, passed_over = find_start(self.config, self.dir, self.ranks)
        warning = self._load(found, engine) if found else None
        if not found and self.config.model.init_from:
            self._load_weights(engine, Path(self.config.model.init_from))
        with self.ranks.together():
            self.records = Records(self.config, self.dir, self.step, self.ranks)
            if self.ranks.main and self.step < self.config.run.steps:
                self.folder.unmark()
        if self.records.validated(self.step):  # perhaps after the save, by a run that then died
            self._validated = self.step
        self.energy.before = self.records.last("energy")
        for line in passed_over:
            self.event("checkpoint_passed_over", f"passed over {line}")
        weights = self.config.model.init_from
        begins = f"starting from the weights of {weights}" if weights else "starting"
        begins = f"resuming {found}" if found else begins
        steps = f"at step {self.step} of {self.config.run.steps}"
        self.event("start", f"{begins} {steps}: {description(self.config, self.ranks)}")
        if warning:
            self.event("schedule", warning)
        for text in self.galaxies.warnings:
            self.event("data", f"warning: {text}")
        if self.config.run.steps <= self.config.schedule.warmup:
            warmup = self.config.schedule.warmup
            self.event("schedule", f"warning: the run ends within schedule.warmup={warmup} updates")
        minutes = self.config.health.hang_minutes
        self.watchdog = Watchdog(self.dir / "stacks", minutes, self.ranks.rank)
        self._clock = time.monotonic()

    def record_step(self, result: StepResult) -> None:
        """Count and record a step. Collective.

        Raises:
            UserError: too many samples failed, or too many updates in a row were skipped.
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
            "gc_pause_s": self.garbage.take(),
            "bad_samples": self.bad.count,
        }
        if drawn := self.galaxies.drawn(self.step * self.config.batch.global_images):
            record["drawn"] = drawn
        self.records.train(self.step, seconds, record)
        self.pace.add(seconds, self.galaxies.waited)
        self.galaxies.waited = 0.0
        self.saves.tell_ended(self.records)
        if result.bad:
            self.bad.add(self._tell_faults("bad_sample", result.faults), self.step)
        if result.skipped:
            self._tell_skipped(result)
        if self.ranks.size > 1 and self.step % self.config.health.pace_every == 0:
            self._compare_ranks()

    def validation_due(self) -> bool:
        """Whether this step's validation is still to be made; a run that stops leaves it."""
        last = self.step == self.config.run.steps
        due = last or self.step % self.config.eval.every == 0
        return due and not self.stopping and self._validated != self.step

    def record_validation(self, validation: Validation) -> None:
        """Record a validation, its failures and its picture. Collective."""
        if self._validated is None:  # the set is fixed: its faults are told once
            self._tell_faults("bad_validation_sample", validation.faults)
        self._validated = self.step
        self.records.validation(self.step, validation, self.galaxies.grid)
        self._go_on()

    def save(self, engine: Engine) -> None:
        """Start to write what is due at this step. Collective."""
        if kinds := self.saves.due(self.step, now=self.stopping):
            state = {
                "engine": engine.state(),
                "bad_samples": self.bad.count,
                "identity": identity(self.config, self.galaxies.hash),
                "config": self.config.model_dump(mode="json"),
            }
            facts = {
                "step": self.step,
                "updates": engine.updates,
                **counters(self.config, self.step),
                "loss": self._loss,
                "seed": self.config.seed,
                "data": self.galaxies.hash,
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
            raise UserError(f"{problem}: given again, the command goes on from an older checkpoint")
        self.energy.close()
        if used := self.energy.total():
            text = "{kwh:.3g} kWh, {kg_co2:.3g} kg of CO2 equivalent in all".format(**used)
            self.event("energy", text, **used)
        if self.stopping:
            self._stop()
        self.bad.check(self.step)
        text = f"complete at step {self.step}: {self.records.summary()}"
        self.event("finish", text)
        self._mark(COMPLETE, text)

    def event(self, name: str, text: str, **values: Any) -> None:
        """Record and show that something happened now."""
        self.records.event(name, self.step, text, **values)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.saves.close()
        self.garbage.close()
        self.energy.close()
        if hasattr(self, "watchdog"):
            self.watchdog.close()
        if hasattr(self, "records"):
            self.records.close(failed=error is not None and not isinstance(error, RunAgain))
        self.folder.close()

    # What happens at its turns.

    def _load(self, path: Path, engine: Engine) -> str | None:
        """Overwrite the engine's state and this run's; a warning about the schedule, if any."""
        with self.ranks.together():
            manifest = checkpoint.read_manifest(path)
            check_fits(path, manifest, self.config, self.galaxies.hash)
            checkpoint.load(path, engine.fragments())
        state = manifest["state"]
        engine.restored(state["engine"])
        self.step = manifest["step"]
        self.bad.count = state["bad_samples"]
        if path.parent.parent.samefile(self.dir):
            self.saves.durable = self.step
        return schedule_warning(manifest, self.config)

    def _load_weights(self, engine: Engine, folder: Path) -> None:
        with self.ranks.together():
            load_weights(folder, self.config.model, engine.shapes(), engine.fragments())
        engine.refresh()

    def _stop(self) -> None:
        """Say what stopped the run and how long that took, on all ranks at once."""
        asked = self.ranks.gather((self.interruption.reason, self.interruption.since))
        rank, reason, since = next((r, why, t) for r, (why, t) in enumerate(asked) if why)
        seconds = time.time() - since
        text = (
            f"{reason} on rank {rank}: saved at step {self.step} of {self.config.run.steps}, "
            f"{seconds:.1f} s after it; the same command goes on"
        )
        self.event("stop", text, reason=reason, rank=rank, durable_s=seconds)
        self._mark(REQUEUE, text)
        raise RunAgain(text)

    def _mark(self, name: str, text: str) -> None:
        """The last thing: a launcher may kill the other ranks as soon as one of them has left."""
        with self.ranks.together():
            if self.ranks.main:
                self.folder.mark(name, text)

    def _tell_skipped(self, result: StepResult) -> None:
        self.event(
            "skipped",
            f"warning: update {result.updates + 1} skipped at step {self.step}: {result.skipped}",
            grad_norm=result.grad_norm,
            loss=result.loss,
        )
        if result.in_a_row >= self.config.health.max_skipped:
            raise UserError(
                f"{result.in_a_row} updates in a row were skipped (health.max_skipped), the last "
                f"because {result.skipped}; the same command goes on from the last checkpoint"
            )

    def _tell_faults(self, event: str, faults: list[Fault]) -> list[Fault]:
        """Record the faults of all ranks, and return them. Collective."""
        everywhere = [fault for faults in self.ranks.gather(faults) for fault in faults]
        for fault in everywhere:
            text = f"bad sample {fault.shard} {fault.key}: {fault.reason}"
            self.event(event, text, shard=fault.shard, key=fault.key)
        return everywhere

    def _compare_ranks(self) -> None:
        places = self.pace.compare()
        values = {f"{key}_s": [getattr(p, key) for p in places] for key in places[0]._fields[1:]}
        hosts = [place.host for place in places]
        self.records.note("pace", self.step, host=hosts, **values)
        for line in stragglers(places):
            self.event("straggler", line)
        self._go_on()

    def _go_on(self) -> None:
        """What was done just now is no part of the next step's time."""
        self.watchdog.alive()
        self._clock = time.monotonic()
