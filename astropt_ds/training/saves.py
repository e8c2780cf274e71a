"""What a run saves, when, and what it keeps: checkpoints and snapshots."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from astropt_ds.config import Config
from astropt_ds.model_folder.weights import DTYPES
from astropt_ds.training import checkpoint, snapshots
from astropt_ds.training.engine import Engine
from astropt_ds.training.fragments import Fragment
from astropt_ds.training.ranks import Ranks
from astropt_ds.training.records import Records
from astropt_ds.training.saver import Saved, Saver, Write

CHECKPOINT, SNAPSHOT = "checkpoint", "snapshot"


class Saves:
    """The saves of a run. Collective.

    Args:
        config: the run's.
        folder: the run's.
        ranks: its processes.
    """

    def __init__(self, config: Config, folder: Path, ranks: Ranks) -> None:
        self.config, self.folder, self.ranks = config, folder, ranks
        self._durable: int | None = None  # the step of the newest checkpoint on the disk
        self._saver = Saver(ranks)
        self._snapshot_steps = snapshots.snapshot_steps(config.snapshot, config.run.steps)
        self._undeleted: list[str] = []  # old checkpoints

    def due(self, step: int, now: bool) -> list[str]:
        """Which kinds of saves are to be made at a step.

        Args:
            step: batches consumed.
            now: the run ends here: a checkpoint is due in any case.
        """
        kinds = []
        now = now or step == self.config.run.steps
        if step not in (0, self._durable) and (now or step % self.config.checkpoint.every == 0):
            kinds.append(CHECKPOINT)
        if step in self._snapshot_steps:
            path = snapshots.snapshot_path(self.folder, step)
            # a run that resumes at its step has it, unless it was killed before it had
            if step != self._durable or not self.ranks.gather(path.exists())[0]:
                kinds.append(SNAPSHOT)
        return kinds

    def loaded(self, path: Path, step: int) -> None:
        """The run starts from a checkpoint; if it is its own, it need not be made again."""
        if path.resolve().is_relative_to(self.folder.resolve()):
            self._durable = step

    def reserve(self, engine: Engine) -> None:
        """Make room for copies of the engine's state while the training goes on."""
        self._saver.reserve(engine.fragments())

    def start(
        self,
        kinds: list[str],
        step: int,
        engine: Engine,
        state: dict[str, Any],
        facts: dict[str, Any],
        records: Records,
    ) -> None:
        """Copy the engine's state and write it in the background, once the save before is done.

        Args:
            kinds: of saves.
            step: batches consumed.
            engine: whose state it is.
            state: what else a resume needs.
            facts: what a snapshot says of the training.
            records: where it is told how a save ended.
        """
        writes: dict[str, Write] = {
            CHECKPOINT: partial(self._write_checkpoint, step, state, records),
            SNAPSHOT: partial(
                snapshots.save,
                snapshots.snapshot_path(self.folder, step),
                self.config.model,
                DTYPES[self.config.snapshot.dtype],
                facts,
            ),
        }
        fragments = engine.fragments()
        if CHECKPOINT not in kinds:
            fragments = [f for f in fragments if f.state == snapshots.WEIGHT]
        before = self._saver.save(step, fragments, {kind: writes[kind] for kind in kinds})
        self._tell(before, records)

    def tell_ended(self, records: Records) -> None:
        """Record what has ended meanwhile, well or badly; the run goes on either way."""
        self._tell(self._saver.finished(), records)

    def wait(self, records: Records) -> str | None:
        """Wait for what is in flight and record it; why it is no checkpoint, if it should be."""
        ended = self._saver.wait()
        self._tell(ended, records)
        return next((s.problem for s in ended if s.problem and s.kind == CHECKPOINT), None)

    def close(self) -> None:
        """Let what is in flight end."""
        self._saver.close()

    def _write_checkpoint(
        self,
        step: int,
        state: dict[str, Any],
        records: Records,
        fragments: list[Fragment],
        ranks: Ranks,
    ) -> Path:
        with ranks.together():
            records.sync()  # a checkpoint never outlasts the records of the steps before it
        path = checkpoint.save(self.folder, step, fragments, state, ranks)
        if ranks.main:
            rules = self.config.checkpoint
            self._undeleted += checkpoint.retain(self.folder, step, rules.keep, rules.keep_every)
        return path

    def _tell(self, ended: list[Saved], records: Records) -> None:
        for saved in ended:
            times = {"stall_s": saved.stall, "durable_s": saved.durable}
            if saved.problem:
                text = f"warning: {saved.kind} of step {saved.step} failed: {saved.problem}"
                records.event(f"{saved.kind}_failed", saved.step, text, **times)
                continue
            if saved.kind == CHECKPOINT:
                self._durable = saved.step
            text = (
                f"saved {saved.path}: {saved.stall:.2f} s of standstill, on the disk after "
                f"{saved.durable:.1f} s"
            )
            records.event(saved.kind, saved.step, text, **times)
        while self._undeleted:
            problem = f"warning: {self._undeleted.pop()}"
            records.event("checkpoint_not_deleted", ended[-1].step if ended else 0, problem)
