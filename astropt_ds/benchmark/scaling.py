"""Several ranks against one, on the same batch: ``python -m astropt_ds.benchmark.scaling FOLDER``.

That is what each rank does; :func:`measure_scaling` starts them, in turns.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from astropt_ds.benchmark.launch import launch
from astropt_ds.benchmark.measure import cpu_seconds
from astropt_ds.benchmark.work import random_batch
from astropt_ds.config_source import load_config
from astropt_ds.errors import run_cli
from astropt_ds.model import AstroPT
from astropt_ds.training.engine import Engine, partitioned
from astropt_ds.training.ranks import start
from astropt_ds.training.step_clock import PARTS

STEPS, UNCOUNTED = 5, 2
CONFIG = "config.yaml"


def measure_scaling(
    source: str, ranks: int, rounds: int, scratch: Path, *keys: str
) -> dict[str, Any]:
    """How much faster several CPU ranks, a thread each, make the same steps than one does.

    Args:
        source: a preset's name or a YAML file.
        ranks: an image each in a step; the one rank takes them at once.
        rounds: in which both take turns.
        scratch: an empty folder.
        keys: dotted overrides.

    Raises:
        UserError: no such preset or file, or what a rank ended by.
    """
    sizes = (f"batch.global_images={ranks}", "precision=fp32")
    config = load_config(source, [*sizes, "run.profile=true", *keys])
    (scratch / CONFIG).write_text(config.to_yaml())
    rows: dict[int, list[dict[str, float]]] = {1: [], ranks: []}
    for _ in range(rounds):
        for number, found in rows.items():
            launch(number, "astropt_ds.benchmark.scaling", str(scratch))
            found.append(json.loads((scratch / f"ranks-{number}.json").read_text()))

    def middle(number: int) -> dict[str, float]:
        return {name: median(row[name] for row in rows[number]) for name in rows[number][0]}

    pairs = list(zip(rows[1], rows[ranks], strict=True))
    tokens = ranks * config.tokens_per_image
    return {
        "tokens_a_second": {
            f"{number} ranks": tokens / middle(number)["step_s"] for number in rows
        },
        "speed_up": median(one["step_s"] / many["step_s"] for one, many in pairs),
        "cpu_seconds_ratio": median(many["cpu_s"] / one["cpu_s"] for one, many in pairs),
        **{f"seconds of a step, {number} ranks": middle(number) for number in rows},
    }


def main(argv: list[str]) -> None:
    """Train for some steps on all ranks, and write down what one took on rank 0."""
    folder = Path(argv[0])
    config = load_config(folder / CONFIG)
    with start() as ranks:
        with partitioned(config, ranks):
            model = AstroPT(config.model, seed=config.seed)
        engine = Engine(model, config, ranks)
        batch = random_batch(config, config.batch.global_images // ranks.size)
        rows = []
        for _ in range(UNCOUNTED + STEPS):
            begin, cpu = time.monotonic(), cpu_seconds()
            result = engine.step([batch])
            seconds = time.monotonic() - begin
            used = ranks.sum([cpu_seconds() - cpu])[0]
            parts = {part: result.seconds[part] for part in PARTS}
            rows.append({"step_s": seconds, "cpu_s": used, **parts})
        found = {name: median(row[name] for row in rows[UNCOUNTED:]) for name in rows[0]}
        if ranks.main:
            (folder / f"ranks-{ranks.size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_cli(main)
