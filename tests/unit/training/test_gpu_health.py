"""What nvidia-smi's answers mean; the answers themselves are those of a script of its name.

On a GPU the real one is asked: tests/gpu/test_preflight.py.
"""

import os

import pytest

from astropt_ds.training.gpu_health import Health, ask

SCRIPT = """#!/bin/sh
case "$*" in
  *{unknown}*) echo 'Field "{unknown}.hw_slowdown" is not a valid field to query.'; exit 2 ;;
  *--id=GPU-abc*--query-gpu=*) echo '{state}' ;;
  *--id=GPU-abc*--query-remapped-rows=*) echo '{memory}' ;;
esac
"""
WELL = "1755, 0, Not Active, Not Active, Not Active"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Put an nvidia-smi first that gives these answers."""

    def smi(state=WELL, memory="0, 0", unknown="clocks_throttle_reasons"):
        script = tmp_path / "nvidia-smi"
        script.write_text(SCRIPT.format(state=state, memory=memory, unknown=unknown))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return smi


@pytest.mark.parametrize("unknown", ["clocks_throttle_reasons", "clocks_event_reasons"])
def test_a_healthy_gpu_has_a_clock_and_no_faults_under_old_and_new_drivers(smi, unknown):
    smi(unknown=unknown)
    assert ask("GPU-abc") == Health(1755, [])


@pytest.mark.parametrize("memory", ["[N/A], [N/A]", "", "Row remapping is not supported"])
def test_what_a_gpu_does_not_have_is_no_fault(smi, memory):
    smi("[N/A], [N/A], Not Active, Not Active, [Not Supported]", memory)
    assert ask("GPU-abc") == Health(None, [])


def test_each_fault_is_told(smi):
    smi("600, 3, Active, Active, Active", "1, 1")
    clock, faults = ask("GPU-abc")
    assert clock == 600 and len(faults) == 6 and faults[0] == "3 uncorrected memory errors"


@pytest.mark.parametrize("state", ["", "Unable to determine the device handle: Unknown Error"])
def test_a_gpu_that_does_not_answer_is_at_fault(smi, state):
    smi(state)
    clock, (fault,) = ask("GPU-abc")
    assert clock is None and fault.startswith("nvidia-smi answers") and state in fault


def test_without_nvidia_smi_the_fault_is_its_absence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-smi does not answer" in ask("GPU-abc").faults[0]
