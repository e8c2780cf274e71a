"""Parameters, floating-point operations and utilisation: closed formulas, no tensors.

Counts are of matrix products, two operations a multiply-add, with attention counted in full as
torch's FLOP counter sees it.
"""

from __future__ import annotations

from astropt_ds.config import ModelConfig

# Dense bf16 peak in FLOP/s by a part of the device's name, from the vendors' data sheets; the
# first match counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}


def _tokeniser_linears(config: ModelConfig) -> list[tuple[int, int]]:
    width, values = config.width, config.images.input_size
    return {
        "relu": [(values, width), (width, width)],
        "aim": [(values, 4 * width), (4 * width, width)],
        "affine": [(values, width)],
    }[config.tokeniser]


def _head_linears(config: ModelConfig) -> list[tuple[int, int]]:
    width, values = config.width, config.images.input_size
    return {
        "relu": [(width, 2 * width), (2 * width, width), (width, values)],
        "aim": [(width, 4 * width), (4 * width, values)],
        "affine": [(width, values)],
    }[config.tokeniser]


def parameters(config: ModelConfig, positions: bool = True) -> int:
    """Parameters of the model, with or without its position table."""
    width, layers = config.width, config.layers
    linears = _tokeniser_linears(config) + _head_linears(config)
    count = sum(n_in * n_out for n_in, n_out in linears)
    if config.tokeniser == "relu":  # the only generation with biases
        count += sum(n_out for _, n_out in linears)
    count += 12 * layers * width**2 + (2 * layers + 1) * width
    return count + (config.block_size * width if positions else 0)


def forward_flops(config: ModelConfig, tokens: int) -> int:
    """Operations of one forward pass over one sequence."""
    linears = _tokeniser_linears(config) + _head_linears(config)
    products = sum(n_in * n_out for n_in, n_out in linears) + 12 * config.layers * config.width**2
    attention = 2 * config.layers * tokens * config.width  # q k^T and its product with v
    return 2 * tokens * (products + attention)


def embedding_flops(config: ModelConfig, tokens: int, blocks: int) -> int:
    """Operations needed for the output of some blocks for the first tokens of a sequence.

    Of attention's, only the causal half is: what a kernel spends on the other is not counted.
    """
    products = sum(n_in * n_out for n_in, n_out in _tokeniser_linears(config))
    products += 12 * blocks * config.width**2
    return 2 * tokens * products + 2 * blocks * tokens * (tokens + 1) * config.width


def training_flops(config: ModelConfig, tokens: int) -> int:
    """Operations of forward and backward over one image of so many tokens.

    The last token is only a target, and no gradient flows into the patches: the first product
    has a gradient for its weight alone.
    """
    inputs = tokens - 1
    n_in, n_out = _tokeniser_linears(config)[0]
    return 3 * forward_flops(config, inputs) - 2 * inputs * n_in * n_out


def palm_flops_per_token(config: ModelConfig, tokens: int) -> int:
    """6 N + 12 L D T (Chowdhery et al. 2022, appendix B), N without the position table."""
    attention = 12 * config.layers * config.width * tokens
    return 6 * parameters(config, positions=False) + attention


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, or None where the table has none."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


def mfu(
    config: ModelConfig, tokens: int, tokens_per_second: float, device_name: str, devices: int
) -> float | None:
    """Model FLOP utilisation by the PaLM convention, or None for a device of unknown peak.

    Args:
        config: the model.
        tokens: in an image.
        tokens_per_second: over all devices.
        device_name: as torch gives it.
        devices: how many.
    """
    peak = peak_flops(device_name)
    if peak is None:
        return None
    return palm_flops_per_token(config, tokens) * tokens_per_second / (peak * devices)
