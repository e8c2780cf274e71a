"""What one launch measures for test_memory.py: the peak of a step of each way to train.

Run by torchrun: ``memory_scenarios.py FOLDER CASE...``, a case being the preset and overrides in
one word; writes a JSON of (planned, measured) bytes by case.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from astropt_ds.config import Config
from astropt_ds.config_source import load_config
from astropt_ds.data.batch import Batch
from astropt_ds.errors import run_cli
from astropt_ds.memory import memory
from astropt_ds.training.ranks import Ranks, start
from tests.distributed.scenarios import build

STEP = "the step that is measured"


def batches(config: Config, ranks: Ranks) -> Iterator[Batch]:
    micro, accumulation = config.batch.split(ranks.size)
    shape = (micro, config.tokens_per_image, 768)
    for _ in range(accumulation):
        patches = torch.empty(shape, dtype=torch.uint8).random_(256)
        yield Batch(patches, torch.ones(micro), torch.arange(micro))


def trace(prof: profile) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def measured(config: Config, ranks: Ranks) -> int:
    """Bytes of all tensors that live at once in the second step, from the building of the model on.

    Added up over the allocations that the profiler saw: its own totals know what other engines
    left, and when that goes.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        engine = build(config, ranks)
        engine.step(batches(config, ranks))  # AdamW's state and ZeRO-3's order are there after it
        with record_function(STEP):
            engine.step(batches(config, ranks))
    events = trace(prof)
    step = next(event for event in events if event.get("name") == STEP)
    first, last = step["ts"], step["ts"] + step["dur"]
    live: dict[int, int] = {}
    peak = now = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            now += size - live.get(address, 0)  # what lay there is gone, whoever freed it
            live[address] = size
        else:
            now -= live.pop(address, 0)
        if first <= event["ts"] <= last:
            peak = max(peak, now)
    return peak


def main(argv: list[str]) -> None:
    found = {}
    with start() as ranks:
        for case in argv[1:]:
            config = load_config("21m", case.split())
            micro, _ = config.batch.split(ranks.size)
            plan = memory(config, ranks.size, micro, gpu=False, per_node=ranks.per_node())
            found[case] = (plan.peak, max(ranks.gather(measured(config, ranks))))
        if ranks.main:
            (Path(argv[0]) / f"memory-{ranks.size}.json").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    run_cli(main)  # its end spares us that of C++ threads
