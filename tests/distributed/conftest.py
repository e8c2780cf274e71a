"""Fixtures: one state as every engine saves it, launched once for all tests of conversion."""

import shutil

import pytest

from astropt_ds.convert.find import open_source
from tests.distributed import convert_scenarios
from tests.distributed.conversions import RANKS, tensors


@pytest.fixture(scope="session")
def conversions(launch, tmp_path_factory):
    """What convert_scenarios.py saves on all numbers of ranks. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("conversion")
    for ranks in RANKS:
        done = launch(ranks, convert_scenarios.__file__, folder, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def saved_state(conversions):
    """The weights and moments that all of them hold."""
    return tensors(open_source(conversions / "origin"))


@pytest.fixture
def copy(conversions, tmp_path):
    """Copies of checkpoints of DeepSpeed's own."""

    def copy(saved):
        return shutil.copytree(conversions / "deepspeed" / saved, tmp_path / saved)

    return copy
