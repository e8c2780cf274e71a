"""Which updates are made: not those of a loss or a gradient that is no number, nor of spikes.

A spike is a value far above those of the last steps, as OLMo (Groeneveld et al. 2024, arXiv
2402.00838, and OLMo-core's skip-step optimizer) has it: one bad batch then costs one update
instead of the run.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from astropt_ds.config_run import HealthConfig

LEAST_SPREAD = 1e-3  # of the mean: values that hardly move have no spikes


class Health:
    """Judges every update by global values, which all ranks know, hence alike on all ranks.

    Args:
        config: the rules.

    Attributes:
        skipped: updates that were skipped since the last one that was made.
    """

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.skipped = 0
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)

    def fault(self, loss: float, norm: float) -> str | None:
        """What is wrong with an update, in words, if anything is.

        Args:
            loss: mean over the global batch.
            norm: of the global gradient, before clipping.
        """
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if self.config.spike == "ignore":
            return None
        for name, value, last in (
            ("loss", loss, self._losses),
            ("gradient norm", norm, self._norms),
        ):
            if len(last) < self.config.window // 2:
                continue
            mean = float(np.mean(last))
            spread = max(float(np.std(last)), LEAST_SPREAD * abs(mean))
            if value > mean + self.config.sigma * spread:
                sigmas = (value - mean) / spread
                return (
                    f"the {name} is {value:.4g}, {sigmas:.3g} sigma above the "
                    f"{mean:.4g} of the last {len(last)} updates"
                )
        return None

    def rule(self, loss: float, norm: float) -> str:
        """The key of the rule that a fault of these values falls under."""
        return "spike" if math.isfinite(loss) and math.isfinite(norm) else "nonfinite"

    def made(self, loss: float, norm: float) -> None:
        """Take note of an update. Skipped ones are left out: they would hide the next spike."""
        self.skipped = 0
        self._losses.append(loss)
        self._norms.append(norm)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        return {
            "skipped": self.skipped,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`."""
        self.skipped = state["skipped"]
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
