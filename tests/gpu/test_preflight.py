"""tools/preflight.py on an NVIDIA GPU: its clock and its health are those that the driver tells."""

import re
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def test_a_line_with_the_clock_and_no_fault_of_a_field_that_is_not_known(shards, tmp_path):
    command = ["tools/preflight.py", "--config", "1m", f"data.path={shards}"]
    done = subprocess.run(
        [sys.executable, *command, f"run.dir={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "nvidia-smi" not in done.stdout, done.stdout + done.stderr
    (line,) = re.findall(r"^.* at (\d+) MHz, .*$", done.stdout, re.MULTILINE)
    assert int(line) > 300
