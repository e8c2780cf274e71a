"""AstroPT: a GPT-2-like transformer that predicts the next patch of a galaxy.

It knows nothing of distribution, files or data. Parameter names are those of AstroPT v3
(``encoders``, ``embedders``, ``transformer.h``, ``decoders``), so that weights travel.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astropt_ds.blocks import Block, BlockFunction
from astropt_ds.config import ModelConfig
from astropt_ds.layers import Embedding, Init, decoder, encoder
from astropt_ds.tokens import grid, standardise


class Trunk(nn.Module):
    """The blocks, and the final norm that only the head reads through."""

    def __init__(self, config: ModelConfig, kernel: str, init: Init) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            Block(config, kernel, init.at(f"h.{i}")) for i in range(config.layers)
        )
        self.ln_f = nn.LayerNorm(config.width, bias=False)

    def blocks(self) -> list[Block]:
        """All of them, in order."""
        return [cast(Block, block) for block in self.h]

    def forward(self, x: Tensor, blocks: int) -> Tensor:
        """The output of the first so many blocks; (batch, tokens, width) to the same."""
        for block in self.h[:blocks]:
            x = block(x)
        return x


class Positions(nn.Module):
    """Learned position table."""

    def __init__(self, config: ModelConfig, init: Init) -> None:
        super().__init__()
        self.wpe = Embedding(config.block_size, config.width, init.at("wpe"))

    def forward(self, x: Tensor) -> Tensor:
        """Positions of the first ``x.shape[1]`` tokens, (tokens, width)."""
        return self.wpe(torch.arange(x.shape[1], device=x.device))


class AstroPT(nn.Module):
    """The model of a :class:`~astropt_ds.config.ModelConfig`.

    Args:
        config: shape and generation.
        seed: of the initial weights.
        kernel: of attention, as :func:`resolve_kernel` takes it.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, kernel: str = "auto") -> None:
        super().__init__()
        self.config = config
        init = Init(seed, config.layers)
        sizes = {name: modality.input_size for name, modality in config.modalities.items()}
        self.encoders = nn.ModuleDict(
            {
                name: encoder(config.tokeniser, size, config.width, init.at(f"encoders.{name}"))
                for name, size in sizes.items()
            }
        )
        self.embedders = nn.ModuleDict(
            {name: Positions(config, init.at(f"embedders.{name}")) for name in sizes}
        )
        self.transformer = Trunk(config, kernel, init.at("transformer"))
        self.decoders = nn.ModuleDict(
            {
                name: decoder(config.tokeniser, config.width, size, init.at(f"decoders.{name}"))
                for name, size in sizes.items()
            }
        )

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the patch that follows each token.

        Args:
            tokens: (batch, tokens, values), standardised patches in spiral order.
            targets: the same shape: the patches that follow. Without them there is no loss.
            weights: (batch,), of each image in the loss; ones if absent. The denominator stays
                the number of images, so that an image of weight zero leaves the others as they are.

        Returns:
            predictions (batch, tokens, values) in the model's dtype, and the loss: the mean over
            images of :func:`huber_per_image`, fp32, or None.

        Raises:
            ValueError: more tokens than the position table holds.
        """
        x = self.hidden_states(tokens, "last")
        predictions = self.decoders["images"](self.transformer.ln_f(x))
        if targets is None:
            return predictions, None
        losses = huber_per_image(predictions, targets)
        return predictions, (losses if weights is None else losses * weights).mean()

    def tokens(self, images: Tensor | np.ndarray) -> Tensor:
        """The tokens of images, as this model reads them: its preprocessing, on its device.

        Args:
            images: (batch, side, side, channels), as stored: uint8 from 0 to 255, or fluxes.

        Returns:
            (batch, tokens, values), fp32: standardised patches in spiral order.

        Raises:
            ValueError: they are not square, or of other channels than the model's, or the side is
                no multiple of the patch.
        """
        if isinstance(images, np.ndarray):
            # torch wants it writable, and in the machine's byte order, which FITS is not
            native = images.dtype.newbyteorder("=")
            images = torch.from_numpy(np.array(images, native, order="C"))
        modality = self.config.modalities["images"]
        if images.ndim != 4 or images.shape[1] != images.shape[2]:
            raise ValueError(f"images of shape {list(images.shape)}: (batch, side, side, channels)")
        if images.shape[3] != modality.channels:
            raise ValueError(f"{images.shape[3]} channels; the model reads {modality.channels}")
        geometry = grid(images.shape[1], modality.patch, self.config.orientation)
        device = self.transformer.ln_f.weight.device
        return standardise(geometry.cut(images.to(device)))

    def hidden_states(
        self, tokens: Tensor, layer: int | str = "last", prefix: int | None = None
    ) -> Tensor:
        """The output of one block, computing neither later blocks nor later tokens.

        Args:
            tokens: (batch, tokens, values), standardised patches in spiral order.
            layer: a block's index from 0 (negative counts from the end), ``last`` (its output
                before the final norm) or ``middle`` (block layers // 2, AstroPT v2's embedding).
            prefix: only the first so many tokens; all if None. In a causal model they are what
                they would be in the whole sequence.

        Returns:
            (batch, prefix or tokens, width).

        Raises:
            ValueError: no such layer or prefix, too many tokens, or a prefix of a model with full
                attention, whose tokens depend on all others.
        """
        blocks = self.blocks_until(layer)
        length = tokens.shape[1]
        if prefix is not None:
            if not 1 <= prefix <= length:
                raise ValueError(f"prefix={prefix} of {length} tokens")
            if prefix < length and self.config.attention == "full":
                raise ValueError("a prefix is exact with causal attention only")
            tokens = tokens[:, :prefix]
        if tokens.shape[1] > self.config.block_size:
            raise ValueError(
                f"{tokens.shape[1]} tokens; model.block_size={self.config.block_size} is the most"
            )
        # the dtype of the final norm, which is partitioned under ZeRO-3 but keeps its dtype
        x = tokens.to(self.transformer.ln_f.weight.dtype)
        x = self.encoders["images"](x) + self.embedders["images"](x)
        return self.transformer(x, blocks)

    def run_blocks_as(self, function: BlockFunction) -> None:
        """Run all blocks so; see :func:`astropt_ds.blocks.block_function`."""
        for block in self.transformer.blocks():
            block.run = function

    def blocks_until(self, layer: int | str) -> int:
        """How many blocks produce the named layer.

        Raises:
            ValueError: there is no such layer.
        """
        return block_index(layer, self.config.layers) + 1


def block_index(layer: int | str, layers: int) -> int:
    """The number, from 0, of the block that a layer names.

    Args:
        layer: as :meth:`AstroPT.hidden_states` takes it.
        layers: of the model.

    Raises:
        ValueError: there is no such layer.
    """
    named: dict[Any, int] = {"last": layers - 1, "middle": layers // 2}
    index = named.get(layer, layer)
    if not isinstance(index, int) or not -layers <= index < layers:
        raise ValueError(
            f"layer {layer!r}: 'last', 'middle' or a number from {-layers} to {layers - 1} fits"
        )
    return index % layers


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model by its name, in order; nothing is allocated."""
    with torch.device("meta"):
        model = AstroPT(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def huber_per_image(predictions: Tensor, targets: Tensor) -> Tensor:
    """Huber loss with delta 1 (Huber 1964), averaged over the tokens and values of each image.

    Args:
        predictions, targets: (batch, tokens, values); compared in fp32.

    Returns:
        (batch,), fp32.
    """
    losses = F.huber_loss(predictions.float(), targets.float(), reduction="none")
    return losses.mean(dim=(1, 2))
