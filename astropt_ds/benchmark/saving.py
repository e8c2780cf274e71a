"""What the ranks of the checkpoint benchmark do: they save, train and load against the clock.

``torchrun -m astropt_ds.benchmark.saving FOLDER ROUNDS``: the folder holds the configuration, and
then the result.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from astropt_ds.benchmark.checkpoint import (
    CONFIG,
    DURABLE,
    LOAD,
    LOST,
    RESULT,
    SAVE,
    STALL,
    STEP,
    STEP_BESIDE,
    THEIRS,
    THEIRS_SYNCED,
)
from astropt_ds.benchmark.work import random_batch
from astropt_ds.config import Config
from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError, run_cli
from astropt_ds.files import sync_file
from astropt_ds.model import AstroPT
from astropt_ds.training import checkpoint
from astropt_ds.training.engine import Engine, partitioned
from astropt_ds.training.fragments import Fragment
from astropt_ds.training.ranks import Ranks, start
from astropt_ds.training.saver import Saved, Saver


def main(argv: list[str]) -> None:
    """Measure on all ranks, and write down what the slowest took."""
    folder, rounds = Path(argv[0]), int(argv[1])
    config = load_config(folder / CONFIG)
    with start() as ranks:
        with partitioned(config, ranks):
            model = AstroPT(config.model, seed=config.seed)
        bench = Bench(Engine(model, config, ranks), config, ranks, folder)
        found = [bench.round() for _ in range(rounds + 1)]
        bench.saver.close()
        if ranks.main:
            seconds = {name: [each[name] for each in found] for name in found[0]}
            (folder / RESULT).write_text(json.dumps({"seconds": seconds, "bytes": bench.bytes}))


class Bench:
    """A model in training on random patches. All methods are collective.

    Args:
        engine: the model.
        config: the run's; an image a rank and step.
        ranks: its processes.
        folder: where checkpoints go, one at a time.

    Attributes:
        saver: of the background saves.
        bytes: of the last checkpoint, ours and DeepSpeed's.
    """

    def __init__(self, engine: Engine, config: Config, ranks: Ranks, folder: Path) -> None:
        self.engine, self.ranks = engine, ranks
        self.ours, self.theirs = folder / "ours", folder / "deepspeed"
        self.saver = Saver(ranks)
        self.bytes: dict[str, int] = {}
        self._batch = random_batch(config, 1)
        self.saver.reserve(engine.fragments())  # as a run does before its first step
        self._step()

    def round(self) -> dict[str, float]:
        """The seconds of everything, side by side."""
        seconds = {SAVE: self._slowest(self._save), LOAD: self._slowest(self._load)}
        self._weigh_and_delete("ours", self.ours)
        stall, durable, beside = self._save_beside_training()
        self._weigh_and_delete("ours", self.ours)
        alone = [self._slowest(self._step) for _ in beside]
        seconds |= {
            STALL: stall,
            DURABLE: durable,
            STEP: sum(alone) / len(alone),
            STEP_BESIDE: sum(beside) / len(beside),
            LOST: stall + sum(beside) - sum(alone),
        }
        seconds[THEIRS] = self._slowest(self._save_as_deepspeed)
        # it leaves the bytes in the page cache: gone if the power is
        seconds[THEIRS_SYNCED] = seconds[THEIRS] + self._slowest(self._sync_theirs)
        self._weigh_and_delete("deepspeed's", self.theirs)
        return seconds

    def _slowest(self, work: Callable[[], None]) -> float:
        """Seconds until all ranks have done it; they begin together."""
        self.ranks.agree(None)
        start = time.perf_counter()
        work()
        return max(self.ranks.gather(time.perf_counter() - start))

    def _step(self) -> None:
        self.engine.step([self._batch])

    def _save(self) -> None:
        checkpoint.save(self.ours, 1, self.engine.fragments(), self.engine.state(), self.ranks)

    def _load(self) -> None:
        """As a run resumes; the files are in the page cache."""
        path, passed_over = checkpoint.find(self.ours, self.ranks)
        if path is None:
            raise UserError(f"{self.ours}: {passed_over}")
        manifest = checkpoint.load(path, self.engine.fragments())
        self.engine.restored(manifest["state"])

    def _save_beside_training(self) -> tuple[float, float, list[float]]:
        """The stall, the time until all is on the disk, and those of the steps meanwhile."""
        stall = self._slowest(self._start_save)
        steps: list[float] = []
        ended: list[Saved] = []
        while not all(self.ranks.gather(bool(ended))):
            steps.append(self._slowest(self._step))
            ended = ended or self.saver.finished()
        (saved,) = ended
        if saved.problem:
            raise UserError(saved.problem)
        return stall, max(self.ranks.gather(saved.durable)), steps

    def _start_save(self) -> None:
        state = self.engine.state()

        def write(fragments: list[Fragment], ranks: Ranks) -> Path:
            return checkpoint.save(self.ours, 1, fragments, state, ranks)

        self.saver.save(1, self.engine.fragments(), {"checkpoint": write})

    def _save_as_deepspeed(self) -> None:
        self.engine.engine.save_checkpoint(str(self.theirs), tag="step-1")

    def _sync_theirs(self) -> None:
        files = sorted(path for path in self.theirs.rglob("*") if path.is_file())
        for path in files[self.ranks.rank :: self.ranks.size]:
            sync_file(path)

    def _weigh_and_delete(self, name: str, folder: Path) -> None:
        if self.ranks.main:
            files = (path for path in folder.rglob("*") if path.is_file())
            self.bytes[name] = sum(path.stat().st_size for path in files)
            shutil.rmtree(folder)


if __name__ == "__main__":
    run_cli(main)
