"""Pretrain AstroPT: ``python -m astropt_ds.train --config 1m data.path=DIR run.dir=DIR``.

The same command under ``torchrun``, ``deepspeed --module`` or ``srun`` trains on many devices.
"""

from __future__ import annotations

from contextlib import closing

from astropt_ds.config import Config
from astropt_ds.config_source import parse_command_line
from astropt_ds.data.loader import Galaxies
from astropt_ds.errors import run_cli
from astropt_ds.model import AstroPT
from astropt_ds.plan import settle
from astropt_ds.training.engine import Engine, partitioned
from astropt_ds.training.environment import attention_kernel
from astropt_ds.training.interruption import Interruption
from astropt_ds.training.ranks import Ranks, check_precision, start, uses_gpu
from astropt_ds.training.run import Run
from astropt_ds.training.slurm import adopt_step
from astropt_ds.training.validation import validate


def main(argv: list[str]) -> None:
    """Read the configuration, join the other ranks, train."""
    adopt_step()
    config = parse_command_line(argv)
    if config is not None:
        # its processes are forked before this one has threads
        with (
            closing(Galaxies(config)) as galaxies,
            Interruption(config.run.max_hours) as interruption,
            start() as ranks,
        ):
            train(config, galaxies, interruption, ranks)


def train(config: Config, galaxies: Galaxies, interruption: Interruption, ranks: Ranks) -> None:
    """Predict the next patch of every galaxy, in spiral order, under a Huber loss."""
    config = settle(config, ranks.size, ranks.device_memory(), ranks.per_node())
    with ranks.together():
        check_precision(config.precision, ranks.device)
        attention_kernel(config, ranks)
        galaxies.open(ranks.rank, ranks.size, pin=uses_gpu(), batch=config.batch)

    with Run(config, galaxies, interruption, ranks) as run:
        with partitioned(config, ranks):
            model = AstroPT(config.model, seed=config.seed, kernel=config.attention.kernel)
        engine = Engine(model, config, ranks)
        run.resume(engine)

        run.save(engine)
        if run.validation_due():
            run.record_validation(validate(engine, galaxies, run.watchdog.alive))
        for batches in galaxies.steps(run.step, config.run.steps):
            run.record_step(engine.step(batches, stop=interruption.wanted()))
            if run.validation_due():
                run.record_validation(validate(engine, galaxies, run.watchdog.alive))
            run.save(engine)
            if run.stopping:
                break
        run.finish()


if __name__ == "__main__":
    run_cli(main)
