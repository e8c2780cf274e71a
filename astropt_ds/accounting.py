"""The floating-point operations of a run, laid out: by part, and from a token to the whole run."""

from __future__ import annotations

from typing import Any

from astropt_ds.config import Config
from astropt_ds.errors import UserError
from astropt_ds.flops import (
    backward_parts,
    causal_training_flops,
    embedding_flops,
    forward_parts,
    hardware_flops,
    palm_flops_per_token,
    parameters,
    recomputed_parts,
    training_flops,
)
from astropt_ds.model import block_index


def account(config: Config) -> dict[str, Any]:
    """All counts of a training.

    Returns:
        ``parameters`` and ``parameters_without_positions``; ``tokens`` an image; ``parts``, the
        operations of an image's forward and backward pass and of what is recomputed, by part;
        ``training``, the counts of a token, image, step and run:

        - ``exact``: with full attention, which is the ``flops`` of metrics.jsonl;
        - ``causal``: with the half of attention that is needed;
        - ``hardware``: exact, and what is computed twice;
        - ``palm``: 6 N + 12 L D T a token; ``6nd``: 6 N a token, the axis of AstroPT's paper.
    """
    model, tokens = config.model, config.tokens_per_image
    weights = parameters(model, positions=False)
    image = {
        "exact": training_flops(model, tokens),
        "causal": causal_training_flops(model, tokens),
        "hardware": hardware_flops(model, tokens, config.recompute),
        "palm": palm_flops_per_token(model, tokens) * tokens,
        "6nd": 6 * weights * tokens,
    }
    step = config.batch.global_images
    scales = {"image": 1, "step": step, "run": step * config.run.steps}
    training: dict[str, dict[str, float]] = {
        "token": {name: count / tokens for name, count in image.items()}
    }
    for scale, images in scales.items():
        training[scale] = {name: count * images for name, count in image.items()}
    return {
        "parameters": parameters(model),
        "parameters_without_positions": weights,
        "tokens": tokens,
        "parts": {
            "forward": forward_parts(model, tokens - 1),
            "backward": backward_parts(model, tokens - 1),
            "recomputed": recomputed_parts(model, tokens - 1, config.recompute),
        },
        "training": training,
    }


def account_embedding(config: Config, layer: int | str, tokens: int | None) -> dict[str, Any]:
    """The counts of one image's embedding.

    Args:
        config: the model's, and the size of its images.
        layer: as :func:`astropt_ds.model.block_index` takes it.
        tokens: only the first so many; all if None.

    Raises:
        UserError: there is no such layer, or there are not so many tokens.
    """
    most = config.tokens_per_image
    tokens = most if tokens is None else tokens
    if not 1 <= tokens <= most:
        raise UserError(f"--tokens {tokens}: 1 to {most}, those of an image, would be right")
    try:
        blocks = block_index(layer, config.model.layers) + 1
    except ValueError as error:
        raise UserError(f"--{error}") from None
    parts = forward_parts(config.model, tokens, blocks, head=False)
    return {
        "layer": layer,
        "blocks": blocks,
        "tokens": tokens,
        "parts": parts,
        "exact": sum(parts.values()),
        "causal": embedding_flops(config.model, tokens, blocks),
    }
