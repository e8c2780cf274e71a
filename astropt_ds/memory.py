"""Bytes that a training takes on each device: closed formulas, no tensors.

The state is ZeRO's (Rajbhandari et al. 2020, section 3); of activations all is counted that
autograd keeps of this package's blocks, tokenisers and heads, and the largest working set.
Compiled blocks are planned as eager ones, of which they keep at most as much.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from astropt_ds.config import Config, ModelConfig
from astropt_ds.flops import block_parameters, head_parameters, parameters
from astropt_ds.zero import zero_settings

ELEMENT = {"fp32": 4, "bf16": 2}  # bytes of a weight, gradient or activation
MASTER = 12  # bytes a parameter of fp32 weights and AdamW's two moments


class Memory(NamedTuple):
    """Bytes on one device; with offload, of what stays on it.

    Attributes:
        weights: kept all the time.
        optimizer: fp32 weights and AdamW's moments.
        gradients: of a whole update.
        held: gradients that are there while the backward pass has most activations.
        gathered: weights of other ranks, while they are used.
        buckets: buffers of the reduction.
        activations: what the backward pass needs, and its largest working set.
        update: what the optimizer's step needs beside.
    """

    weights: int
    optimizer: int
    gradients: int
    held: int
    gathered: int
    buckets: int
    activations: int
    update: int

    @property
    def state(self) -> int:
        """What is there whatever the batch: weights, gradients, optimizer."""
        return self.weights + self.optimizer + self.gradients

    @property
    def peak(self) -> int:
        """The most at one time: as the backward pass begins, or in the optimizer's step."""
        working = self.held + self.gathered + self.activations
        return (
            self.weights
            + self.optimizer
            + self.buckets
            + max(working, self.gradients + self.update)
        )


def memory(config: Config, ranks: int, micro: int, gpu: bool, per_node: int = 1) -> Memory:
    """The plan of one device.

    Args:
        config: of the run, its stage settled.
        ranks: over which ZeRO partitions.
        micro: images that a rank takes at once.
        gpu: whether it computes on GPUs.
        per_node: ranks of a node, among which ``zero.hpz`` partitions the weights once more.
    """
    per_node = min(per_node, ranks)
    count, element = parameters(config.model), ELEMENT[config.precision]
    stage, offload = config.zero.level, config.zero.offload
    zero = zero_settings(config.zero, gpu)["zero_optimization"]
    share = count / ranks
    weights = element * (share if stage == 3 else count)
    optimizer = MASTER * (share if stage else count) - (0 if stage else 4 * count)
    gradients = element * (share if stage >= 2 else count)
    accumulates = config.batch.global_images > micro * ranks
    gathered = buckets = update = 0.0
    if stage == 3:
        gathered = element * gathered_weights(config, ranks, zero)
        buckets = element * zero.get("reduce_bucket_size", 5e8)
        update = 4 * min(share, zero.get("sub_group_size", 1e9)) if element < 4 else 0.0
        if config.zero.hpz and per_node > 1:
            weights += element * count / per_node
    elif stage:
        if zero["contiguous_gradients"]:
            buffers = 2 if zero["overlap_comm"] else 1
            buckets = buffers * element * zero.get("reduce_bucket_size", 5e8)
        # a rank's share of the gradients end to end, and in fp32
        update = share * (element + (4 if element < 4 else 0))
    if offload:
        weights = optimizer = gradients = update = 0.0
    held = gradients if accumulates or stage >= 2 else 0
    if stage == 2 and accumulates:
        held += gradients  # the last micro-batch's are reduced beside the sum of those before
    activations = activation_bytes(config, micro)
    numbers = (weights, optimizer, gradients, held, gathered, buckets, activations, update)
    return Memory(*map(round, numbers))


def kept_weights(model: ModelConfig, zero: dict[str, Any]) -> int:
    """Weights that ZeRO-3 gathers in the forward pass and still has in the backward pass.

    It keeps a block that comes again within a distance, which counts the head's weights forward
    and backward, and the blocks after it once: the first block of the way back stands for all.
    So measured on DeepSpeed 0.19.8, which keeps all else.

    Args:
        model: its shape.
        zero: DeepSpeed's ``zero_optimization``.
    """
    block = block_parameters(model)
    room = zero.get("stage3_max_reuse_distance", 1e9) - 2 * head_parameters(model)
    kept = min(max(math.ceil(room / block), 0), model.layers)  # the last so many blocks
    return parameters(model) - (model.layers - kept) * block


def gathered_weights(config: Config, ranks: int, zero: dict[str, Any]) -> float:
    """Weights of all ranks that ZeRO-3 holds beside its own share as the backward pass begins.

    Some are kept; those fetched ahead arrive end to end in a buffer, which stays until the last of
    them was cut out of it. One rank uses its share where it lies.
    """
    if ranks == 1 and not config.zero.offload:
        return 0.0
    ahead = zero.get("stage3_prefetch_bucket_size", 5e7) + block_parameters(config.model)
    return kept_weights(config.model, zero) + min(parameters(config.model), ahead)


def host_bytes(config: Config, ranks: int) -> int:
    """What a rank keeps in the host's memory with offload: weights, gradients and optimizer."""
    if not config.zero.offload:
        return 0
    element = ELEMENT[config.precision]
    return round(parameters(config.model) / ranks * (2 * element + MASTER))


def block_bytes(
    model: ModelConfig, element: int, recompute: str, scores: int = 0
) -> tuple[int, int]:
    """Bytes a token that a block keeps for the backward pass, and needs when that passes.

    Kept are the inputs of both norms and of all products, q, k and v, attention's output, the
    hidden layer before and after its activation, and a few numbers in fp32; ``selective`` keeps
    the products' and attention's outputs, ``full`` the block's input.

    Args:
        model: its shape.
        element: bytes of an activation.
        recompute: as in the configuration.
        scores: bytes of a token's attention scores, where a kernel keeps them.
    """
    wide = model.width * element
    scalars = 4 * 4 + 4 * model.heads  # of both norms, and attention's normalisation
    all_of_it = 16 * wide + scalars + scores
    kept = {
        "none": all_of_it,
        "selective": 11 * wide + 4 * model.heads + scores,
        "full": wide,
    }[recompute]
    again = all_of_it - wide if recompute == "full" else 5 * wide * (recompute == "selective")
    return kept, 5 * wide + again + 2 * scores


def activation_bytes(config: Config, micro: int) -> int:
    """What a micro-batch's forward pass leaves for the backward pass, with its working set.

    Args:
        config: of the run.
        micro: images in it.
    """
    model, element = config.model, ELEMENT[config.precision]
    tokens = config.tokens_per_image
    rows, values, width = micro * (tokens - 1), model.images.input_size, model.width
    # eager attention keeps all weights of its softmax, and which of them are masked
    eager = config.attention.kernel == "eager"
    scores = (tokens - 1) * (model.heads * element + 1) if eager else 0
    kept, working = block_bytes(model, element, config.recompute, scores)
    # as bytes and standardised; the first so many as the model's inputs
    batch = micro * tokens * values * (1 + 4) + rows * values * element
    tokeniser = {"relu": 2 * width, "aim": 8 * width, "affine": 0}[model.tokeniser]
    head = {"relu": 4 * width, "aim": 9 * width, "affine": width}[model.tokeniser]
    below = batch + rows * (element * tokeniser + model.layers * kept)
    # the loss compares in fp32, and its gradient is of the same size
    loss = rows * (element * (head + width) + 2 * 4 * values)
    return below + max(loss, rows * working)
