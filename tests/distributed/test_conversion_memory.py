"""Converting takes the memory of a few tensors, however large the model."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from astropt_ds.config_source import load_config
from astropt_ds.files import sha256_file, write_durably
from astropt_ds.flops import parameters
from astropt_ds.model import parameter_shapes
from astropt_ds.training import checkpoint
from astropt_ds.training.fragments import STATES, Fragment
from astropt_ds.training.ranks import ALONE
from astropt_ds.training.staging import merge, write_fragments
from tests.conftest import REPOSITORY

OVERRIDES = ("model.layers=6", "model.heads=8", "model.width=768")
LARGE = load_config("1m", OVERRIDES)
LARGE_RANKS = 4
MEASURE = """
import sys
from pathlib import Path
from astropt_ds.config_source import load_config
from astropt_ds.convert.find import open_source
from astropt_ds.convert.write import write_model_folder
path, output, *overrides = sys.argv[1:]
model = load_config("1m", overrides).model if overrides else None
def peak():  # resource's begins with what the parent process had
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
idle = peak()
write_model_folder(open_source(Path(path), model), Path(output))
print(peak() - idle)
"""


def share(shape, rank):
    """Start and length of what ZeRO-3 gives a rank of a tensor, padding included."""
    count = int(np.prod(shape))
    length = -(-count // LARGE_RANKS)
    return rank * length, min(length, count - rank * length)


def large_run(path):
    """A checkpoint of ours as four ranks write it under ZeRO-3."""
    final = path / "checkpoints" / "step-00000001"
    final.mkdir(parents=True)
    parts = []
    for rank in range(LARGE_RANKS):
        generator = torch.Generator().manual_seed(rank)
        fragments = []
        for name, shape in parameter_shapes(LARGE.model).items():
            start, length = share(shape, rank)
            for state in STATES if length > 0 else ():
                values = torch.rand(length, generator=generator)
                fragments.append(Fragment(name, state, shape, start, values, True))
        parts += write_fragments(final, fragments, replace(ALONE, rank=rank))
    manifest = {
        "format": checkpoint.FORMAT,
        "step": 1,
        "state": {"config": LARGE.model_dump(mode="json"), "facts": {}, "engine": {"updates": 1}},
        "files": {part["file"]: part["facts"] for part in parts},
        "tensors": merge(parts),
    }
    write_durably(final / "manifest.json", json.dumps(manifest))
    write_durably(final / "complete", sha256_file(final / "manifest.json") + "\n")


def large_deepspeed(path):
    """The same sizes as DeepSpeed writes them."""
    path.mkdir()
    shapes = parameter_shapes(LARGE.model)
    common = {"buffer_names": [], "global_steps": 1, "frozen_param_shapes": None}
    header = {**common, "module": {}, "optimizer": None, "param_shapes": [shapes]}
    torch.save(header, path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in range(LARGE_RANKS):
        generator = torch.Generator().manual_seed(rank)
        values = torch.rand(sum(share(s, 0)[1] for s in shapes.values()), generator=generator)
        state = {
            "partition_count": LARGE_RANKS,
            "fp32_flat_groups": [values],
            "optimizer_state_dict": {"state": {}, "param_groups": []},
        }
        file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, path / file)


@pytest.mark.parametrize("make", [large_run, large_deepspeed])
def test_converting_takes_the_memory_of_a_few_tensors(tmp_path, make):
    make(path := tmp_path / "saved")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    weights = 4 * parameters(LARGE.model)
    assert size >= weights * (len(STATES) if make is large_run else 1)
    arguments = (path, tmp_path / "model", *(OVERRIDES if make is large_deepspeed else ()))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    largest = max(4 * int(np.prod(s)) for s in parameter_shapes(LARGE.model).values())
    assert int(done.stdout) < 6 * largest < weights / 3
