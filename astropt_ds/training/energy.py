"""Electricity and CO2 of a machine, measured by codecarbon on request."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from typing import Any

from astropt_ds.config import EnergyConfig
from astropt_ds.errors import UserError
from astropt_ds.training.ranks import Ranks

SECONDS = 15.0  # between measurements
NAMES = ("kwh", "kg_co2")


class Energy:
    """What a machine has used since the start. Made by one process a machine.

    Processors, memory and GPUs are counted, by their sensors where those can be read and estimated
    from load and type elsewhere; CO2 follows from the mix of the country's grid.

    Args:
        config: the run's; without a country nothing is measured, and codecarbon not imported.

    Raises:
        UserError: codecarbon is not installed, does not know the country or does not start.
    """

    def __init__(self, config: EnergyConfig) -> None:
        self._tracker: Any = None
        if config.country is None:
            return
        option = f"energy.country={config.country}"
        try:
            from codecarbon import OfflineEmissionsTracker
            from codecarbon.input import DataSource
        except ImportError:
            raise UserError(
                f"{option} needs codecarbon: pip install 'astropt-ds[energy]' would be right"
            ) from None
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        if config.country not in DataSource().get_global_energy_mix_data():
            raise UserError(
                f"{option} is no country that codecarbon knows; a code of ISO 3166 like FRA, DEU "
                "or USA would be right"
            )
        self._last = _Last()
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=config.country,
            tracking_mode="machine",
            measure_power_secs=SECONDS,
            api_call_interval=1,  # every measurement reaches the handler
            output_handlers=[self._last],
            output_methods=[],  # neither files
            emissions_endpoint=None,  # nor network
            electricitymaps_api_token="",
            allow_multiple_runs=True,
            log_level="error",
        )
        self._tracker.start()
        if self._last.total is None:  # it hides its own exceptions
            raise UserError(
                f"{option}: codecarbon does not start; its settings in .codecarbon.config and "
                "in CODECARBON_ variables may be wrong"
            )

    def read(self) -> tuple[float, float] | None:
        """(kWh, kg of CO2 equivalent) since the start, or None where nothing is measured.

        As of the last measurement, at most 15 seconds ago: none is made here, since codecarbon's
        thread and this one would count the same time twice. After :meth:`close`, of all the time.
        """
        if self._tracker is None:
            return None
        return self._last.total.energy_consumed, self._last.total.emissions

    def close(self) -> None:
        """Measure once more, and no longer. More than once is once."""
        if self._tracker is not None:
            self._tracker.stop()


class RunEnergy:
    """The same for all machines of a run, over all its attempts as they are on record. Collective.

    Args:
        config: the run's.
        ranks: its processes.

    Raises:
        UserError: as :class:`Energy` does.
    """

    def __init__(self, config: EnergyConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self._before = [0.0] * len(NAMES)
        self._measured = config.country is not None
        hosts = ranks.gather(socket.gethostname())
        first = hosts.index(hosts[ranks.rank]) == ranks.rank
        self._energy = Energy(config if first else EnergyConfig())

    def total(self) -> dict[str, float] | None:
        """``kwh`` and ``kg_co2`` (equivalent) so far, or None where nothing is measured."""
        if not self._measured:
            return None
        now = self.ranks.sum(list(self._energy.read() or (0.0, 0.0)))
        return {name: a + b for name, a, b in zip(NAMES, self._before, now, strict=True)}

    def go_on_from(self, total: Mapping[str, float]) -> None:
        """Add what the attempts before this one used."""
        self._before = [total[name] for name in NAMES]

    def close(self) -> None:
        """Measure no longer; the total is then that of all the time."""
        self._energy.close()


class _Last:
    """A handler, as codecarbon calls them with each measurement, that keeps the last one."""

    total: Any = None

    def out(self, total: Any, delta: Any) -> None:
        self.total = total

    live_out = out

    def exit(self) -> None:
        pass
