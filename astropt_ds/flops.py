"""Parameters, floating-point operations and utilisation: closed formulas, no tensors.

Counts are of matrix products, two operations a multiply-add, with plain attention in full, as
torch's FLOP counter sees it; what causal kernels leave out is :func:`causal_excess`.
"""

from __future__ import annotations

import re

from astropt_ds.config import Config, ModelConfig

Parts = dict[str, int]  # operations of the tokeniser, attention, mlp and head

# Dense peaks in FLOP/s (bf16 on tensor cores, fp32 without TF32) by words of the device's name,
# from the vendors' data sheets; the first match counts. 0: the device has none.
PEAKS = {
    "GB200": {"bf16": 2500e12, "fp32": 80e12},
    "GH200": {"bf16": 989.4e12, "fp32": 67e12},
    "B200": {"bf16": 2250e12, "fp32": 75e12},
    "H200": {"bf16": 989.4e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100 NVL": {"bf16": 835e12, "fp32": 60e12},
    "H100": {"bf16": 989.4e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "A40": {"bf16": 149.7e12, "fp32": 37.4e12},
    "A30": {"bf16": 165e12, "fp32": 10.3e12},
    "A10G": {"bf16": 70e12, "fp32": 35e12},
    "A10": {"bf16": 125e12, "fp32": 31.2e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
    "L40": {"bf16": 181e12, "fp32": 90.5e12},
    "L4": {"bf16": 121e12, "fp32": 30.3e12},
    "V100": {"bf16": 0.0, "fp32": 15.7e12},
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


def block_parameters(config: ModelConfig) -> int:
    """Parameters of a block."""
    return 12 * config.width**2 + 2 * config.width


def head_parameters(config: ModelConfig) -> int:
    """Parameters of what follows the blocks."""
    linears = _head_linears(config)
    count = sum(n_in * n_out for n_in, n_out in linears) + config.width
    return count + (sum(n_out for _, n_out in linears) if config.tokeniser == "relu" else 0)


def forward_parts(
    config: ModelConfig, tokens: int, blocks: int | None = None, head: bool = True
) -> Parts:
    """Operations of a forward pass over one sequence, by part.

    Args:
        config: the model.
        tokens: in the sequence.
        blocks: that run; all if None.
        head: whether the predictions are made.
    """
    width, blocks = config.width, config.layers if blocks is None else blocks

    def products(linears: list[tuple[int, int]]) -> int:
        return 2 * tokens * sum(n_in * n_out for n_in, n_out in linears)

    return {
        "tokeniser": products(_tokeniser_linears(config)),
        "attention": blocks * (products([(width, 4 * width)]) + _scores(config, tokens)),
        "mlp": blocks * products([(width, 4 * width), (4 * width, width)]),
        "head": products(_head_linears(config)) if head else 0,
    }


def _scores(config: ModelConfig, tokens: int) -> int:
    """Of q k^T and its product with v, in one block."""
    return 4 * tokens * tokens * config.width


def backward_parts(config: ModelConfig, tokens: int) -> Parts:
    """Operations of the backward pass over one sequence, by part.

    A product has two gradients. No gradient flows into the patches: the first product has one for
    its weight alone.
    """
    parts = {part: 2 * count for part, count in forward_parts(config, tokens).items()}
    n_in, n_out = _tokeniser_linears(config)[0]
    parts["tokeniser"] -= 2 * tokens * n_in * n_out
    return parts


def recomputed_parts(config: ModelConfig, tokens: int, recompute: str) -> Parts:
    """Operations that the backward pass repeats of the forward pass, by part.

    ``selective`` keeps all products; ``full`` repeats the blocks but for each one's last product,
    whose output no gradient needs.
    """
    if recompute != "full":
        return dict.fromkeys(forward_parts(config, tokens), 0)
    parts = forward_parts(config, tokens, head=False)
    parts["tokeniser"] = 0
    parts["mlp"] -= config.layers * 2 * tokens * 4 * config.width * config.width
    return parts


def causal_excess(config: ModelConfig, tokens: int, blocks: int | None = None) -> int:
    """Operations of a forward pass's full attention that causal attention does not need."""
    blocks = config.layers if blocks is None else blocks
    return blocks * 2 * tokens * (tokens - 1) * config.width


def forward_flops(config: ModelConfig, tokens: int) -> int:
    """Operations of one forward pass over one sequence."""
    return sum(forward_parts(config, tokens).values())


def embedding_flops(config: ModelConfig, tokens: int, blocks: int) -> int:
    """Operations needed for the output of some blocks for the first tokens of a sequence.

    Of attention's, only the causal half is: what a kernel spends on the other is not counted.
    """
    parts = forward_parts(config, tokens, blocks, head=False)
    return sum(parts.values()) - causal_excess(config, tokens, blocks)


def training_flops(config: ModelConfig, tokens: int) -> int:
    """Operations of forward and backward over one image of so many tokens.

    The last token is only a target.
    """
    inputs = tokens - 1
    return forward_flops(config, inputs) + sum(backward_parts(config, inputs).values())


def causal_training_flops(config: ModelConfig, tokens: int) -> int:
    """The same with the causal half of attention only."""
    return training_flops(config, tokens) - 3 * causal_excess(config, tokens - 1)


def hardware_flops(config: ModelConfig, tokens: int, recompute: str) -> int:
    """The same as :func:`training_flops`, with what is computed twice."""
    repeated = recomputed_parts(config, tokens - 1, recompute)
    return training_flops(config, tokens) + sum(repeated.values())


def palm_flops_per_token(config: ModelConfig, tokens: int, causal: bool = False) -> int:
    """6 N + 12 L D T (Chowdhery et al. 2022, appendix B), N without the position table.

    Args:
        config: the model.
        tokens: in a sequence, T.
        causal: count half of attention's 12 L D T.
    """
    attention = (6 if causal else 12) * config.layers * config.width * tokens
    return 6 * parameters(config, positions=False) + attention


def peak_flops(device_name: str, precision: str = "bf16") -> float | None:
    """Dense peak of a device in FLOP/s, or None where the table has none."""
    named = (peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", device_name))
    found = next(named, None)
    return (found and found[precision]) or None


def utilisation(
    config: Config, tokens_per_second: float, device_name: str, devices: int
) -> dict[str, float | None]:
    """Shares of the devices' peak: None for a device of unknown peak.

    Args:
        config: the run's.
        tokens_per_second: over all devices, every token of the images counted.
        device_name: as torch gives it.
        devices: how many.

    Returns:
        ``mfu`` by the PaLM convention, ``mfu_causal`` with half of attention, and ``hfu``: the
        exact count with recomputation (Korthikanti et al. 2022), attention still in full, though
        fused kernels compute its causal half.
    """
    tokens = config.tokens_per_image
    each = {
        "mfu": palm_flops_per_token(config.model, tokens),
        "mfu_causal": palm_flops_per_token(config.model, tokens, causal=True),
        "hfu": hardware_flops(config.model, tokens, config.recompute) / tokens,
    }
    peak = peak_flops(device_name, config.precision)
    rate = tokens_per_second / (peak * devices) if peak else None
    return {name: None if rate is None else count * rate for name, count in each.items()}
