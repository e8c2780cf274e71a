"""What the ranks of the conversion benchmark do: they save the same state in two layouts.

``torchrun -m astropt_ds.benchmark.convertible FOLDER``: the folder holds the configuration, and
then a checkpoint of ours and one that DeepSpeed wrote.
"""

from __future__ import annotations

from pathlib import Path

from astropt_ds.benchmark.conversion import CHECKPOINT, CONFIG, DEEPSPEED
from astropt_ds.config_source import load_config
from astropt_ds.errors import run_cli
from astropt_ds.model import AstroPT
from astropt_ds.training import checkpoint
from astropt_ds.training.engine import Engine, partitioned
from astropt_ds.training.ranks import start


def main(argv: list[str]) -> None:
    """Build the model as a run does, and save it untrained."""
    folder = Path(argv[0])
    config = load_config(folder / CONFIG)
    with start() as ranks:
        with partitioned(config, ranks):
            model = AstroPT(config.model, seed=config.seed)
        engine = Engine(model, config, ranks)
        state = {
            "engine": engine.state(),
            "facts": {"step": 1},
            "config": config.model_dump(mode="json"),
        }
        checkpoint.save(folder / CHECKPOINT, 1, engine.fragments(), state, ranks)
        engine.engine.save_checkpoint(str(folder / DEEPSPEED), tag="step-1")


if __name__ == "__main__":
    run_cli(main)
