"""What only a model's owner can say of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from astropt_ds.errors import UserError

LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")  # docs/hub/repositories-licenses
DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
UNKNOWN = "unknown"  # a licence, as the hub has it


@dataclass(frozen=True)
class Release:
    """What only a model's owner can say of it.

    Attributes:
        license: its identifier on the hub, as ``mit`` or ``cc-by-4.0``.
        datasets: the ids on the hub of what it was trained on.

    Raises:
        UserError: one is not of the hub's form.
    """

    license: str = UNKNOWN
    datasets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not LICENSE.fullmatch(self.license):
            raise UserError(
                f"license={self.license}: not an identifier of the Hugging Face hub; one like mit, "
                "apache-2.0, cc-by-4.0 or other would be right"
            )
        for name in self.datasets:
            if not DATASET.fullmatch(name):
                raise UserError(f"datasets={name}: not an id of the hub, as organisation/name is")
