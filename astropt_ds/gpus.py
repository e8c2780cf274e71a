"""The GPUs that a run can be planned for: the vendors' figures."""

from __future__ import annotations

from typing import NamedTuple

from astropt_ds.errors import UserError
from astropt_ds.flops import peak_flops


class Gpu(NamedTuple):
    """One of them.

    Attributes:
        name: in the table of peaks.
        memory: bytes that a program sees.
        watts: of the board at its limit.
        link: bytes a second in one direction to the GPUs of its node.
        net: bytes a second in one direction to other nodes, a GPU's share of its node's.
    """

    name: str
    memory: float
    watts: float
    link: float
    net: float

    def peak(self, precision: str) -> float:
        """Dense peak in FLOP/s."""
        peak = peak_flops(self.name, precision)
        assert peak is not None
        return peak


# Memory as torch reports it. Links: NVLink, or PCIe where there is none; nets: one 400 Gb/s adapter
# a GPU beside H100, H200 and B200, 200 Gb/s beside A100, 100 Gb/s shared by four elsewhere.
GPUS = {
    "b200": Gpu("B200", 191.5e9, 1000, 900e9, 50e9),
    "h200": Gpu("H200", 150.1e9, 700, 450e9, 50e9),
    "h100": Gpu("H100", 84.9e9, 700, 450e9, 50e9),
    "a100": Gpu("A100", 85.0e9, 400, 300e9, 25e9),
    "a100-40": Gpu("A100", 42.3e9, 400, 300e9, 25e9),
    "l40s": Gpu("L40S", 47.7e9, 350, 32e9, 3e9),
    "a40": Gpu("A40", 47.7e9, 300, 32e9, 3e9),
    "l4": Gpu("L4", 23.6e9, 72, 32e9, 3e9),
}


def gpu_named(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UserError: none is.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: one of {', '.join(GPUS)} would be right")
    return GPUS[name.lower()]
