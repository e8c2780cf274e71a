import os
import subprocess
import sys
import time

import pytest

from astropt_ds.config import EnergyConfig
from astropt_ds.errors import UserError
from astropt_ds.training import energy as module
from astropt_ds.training.energy import Energy
from tests.conftest import REPOSITORY

FRANCE = EnergyConfig(country="FRA")


@pytest.fixture
def codecarbon():
    return pytest.importorskip("codecarbon")


def compute(done):
    until = time.monotonic() + 10
    while not done() and time.monotonic() < until:
        sum(range(1000))


def run(folder, script, **variables):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    command = [sys.executable, "-c", script]
    options = {"capture_output": True, "text": True, "timeout": 60}
    return subprocess.run(command, env=environment, cwd=folder, **options)


def test_energy_grows_while_a_loop_computes(codecarbon, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.1)
    start = time.monotonic()
    energy = Energy(FRANCE)
    for _ in range(2):
        kwh, co2 = energy.read()
        compute(lambda before=kwh: energy.read()[0] > before)
        assert energy.read()[0] > kwh >= 0 and energy.read()[1] > co2 >= 0
    energy.close()
    kwh, co2 = energy.read()
    assert 1 < kwh * 3.6e6 / (time.monotonic() - start) < 10_000  # watts
    assert 0.02 < co2 / kwh < 0.1  # the grid of France: 56 g a kWh


def test_measuring_says_nothing_writes_nothing_and_asks_nobody(codecarbon, tmp_path):
    script = """
import sys
from astropt_ds.config import EnergyConfig
from astropt_ds.training.energy import Energy

def listen(event, values):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print(event, values)

sys.addaudithook(listen)
runs = [Energy(EnergyConfig(country="FRA")) for _ in range(2)]  # that share a machine
for energy in runs:
    energy.close()
    assert energy.read() > (0, 0)
"""
    # what users may have set for other programs
    settings = {
        "CODECARBON_EMISSIONS_ENDPOINT": "http://localhost:9",
        "CODECARBON_ELECTRICITYMAPS_API_TOKEN": "secret",
        "CODECARBON_LOG_LEVEL": "debug",
        "CODECARBON_ALLOW_MULTIPLE_RUNS": "false",
    }
    done = run(tmp_path, script, **settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_last_measurement_is_made_at_the_end(codecarbon, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 3600.0)
    energy = Energy(FRANCE)
    before = energy.read()
    until = time.monotonic() + 0.2
    compute(lambda: time.monotonic() > until)
    assert energy.read() == before
    energy.close()
    assert energy.read() > before


def test_a_run_without_a_country_neither_measures_nor_imports_codecarbon(tmp_path):
    script = """
import sys
from astropt_ds.config import EnergyConfig
from astropt_ds.training.energy import Energy

energy = Energy(EnergyConfig())
assert energy.read() is None
energy.close()
assert "codecarbon" not in sys.modules
"""
    done = run(tmp_path, script)
    assert done.returncode == 0, done.stderr


def test_a_country_that_is_none_is_one_line(codecarbon):
    with pytest.raises(UserError) as error:
        Energy(EnergyConfig(country="XXX"))
    assert str(error.value) == (
        "energy.country=XXX is no country that codecarbon knows; a code of ISO 3166 like FRA, "
        "DEU or USA would be right"
    )


def test_energy_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)  # as if it were not installed
    with pytest.raises(UserError) as error:
        Energy(FRANCE)
    assert str(error.value) == (
        "energy.country=FRA needs codecarbon: pip install 'astropt-ds[energy]' would be right"
    )


def test_a_codecarbon_that_does_not_start_is_one_line(codecarbon, monkeypatch):
    monkeypatch.setenv("CODECARBON_OUTPUT_DIR", "nowhere")
    with pytest.raises(UserError, match="energy.country=FRA: codecarbon does not start; its set"):
        Energy(FRANCE)
