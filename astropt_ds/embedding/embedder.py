"""A model that embeds images: its preprocessing, the blocks and tokens that are needed, pooling."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from astropt_ds.convert.load import load_model
from astropt_ds.embedding.recipe import Recipe, make_recipe
from astropt_ds.errors import UserError, one_line
from astropt_ds.model import AstroPT
from astropt_ds.model_folder.weights import DTYPES
from astropt_ds.tokens import grid, prefix_grid, standardise

# Tokens in a batch: what fits a core's cache, and what keeps a GPU busy.
CORE_TOKENS, GPU_TOKENS = 1024, 262_144


class Embedder:
    """Embeds images with a model, as AstroPT does it unless other things are asked for.

    Args:
        model: a model, or where it is, as :func:`astropt_ds.load_model` takes it.
        layer: ``last``, ``middle``, a block's number from 0 (negative: from the end), or several
            of them; if None that of the model's generation: the last block of v1 (before the final
            norm), block layers // 2 of v2 and v3.
        pooling: over an image's tokens: ``mean``, ``max``, ``last``, ``exp_decay``, or ``none`` for
            an embedding of each token.
        tokens: so many from the centre, or ``all``; if None the first 64 for v1, all for v2 and v3.
        device: ``auto`` takes a GPU where there is one.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the device has it.
        batch: images at once, or ``auto``. Where memory runs out it is halved.
        compile: compile the model first, which takes a minute and pays for many images.

    Raises:
        UserError: there is no such model, device or precision.
    """

    def __init__(
        self,
        model: AstroPT | str | Path,
        layer: int | str | Sequence[int | str] | None = None,
        pooling: str | None = None,
        tokens: int | str | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        batch: int | str = "auto",
        compile: bool = False,
    ) -> None:
        self.device = find_device(device)
        self.precision = find_precision(precision, self.device)
        self._layers = () if layer is None else (layer,) if isinstance(layer, int | str) else layer
        self._pooling, self._tokens, self._batch = pooling, tokens, batch
        check_batch(batch)
        if not isinstance(model, AstroPT):
            model = load_model(model)
        self.config, dtype = model.config, DTYPES[self.precision]
        weight = model.transformer.ln_f.weight
        if weight.device != self.device or weight.dtype != dtype:
            model = copy.deepcopy(model).to(self.device, dtype)  # the caller's stays as it is
        self._model = model
        self._states = torch.compile(self._eager_states) if compile else self._eager_states

    def embed(
        self, images: np.ndarray | Tensor | Sequence[np.ndarray]
    ) -> np.ndarray | dict[str, np.ndarray]:
        """The embeddings of images.

        Args:
            images: (images, side, side, channels), as stored: uint8 from 0 to 255, or fluxes; the
                side a multiple of the patch.

        Returns:
            (images, width) fp32, or (images, tokens, width) with pooling ``none``; of several
            layers, a dictionary of them by the name of their column in a table.

        Raises:
            UserError: the images do not fit the model, or what is asked for does not fit them.
        """
        if not isinstance(images, Tensor):
            try:
                array = np.asarray(images)
            except ValueError:
                raise UserError("images of several sizes; one size at a time") from None
            if array.dtype.kind not in "uif":
                raise UserError(f"images of {array.dtype}; uint8, or fluxes, would be right")
            # torch wants the machine's byte order, which FITS is not in
            images = torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))
        modality = self.config.images
        if images.ndim != 4 or images.shape[1] != images.shape[2]:
            raise UserError(f"images of shape {list(images.shape)}: (batch, side, side, channels)")
        if images.shape[3] != modality.channels:
            raise UserError(f"{images.shape[3]} channels; the model reads {modality.channels}")
        try:
            whole = grid(images.shape[1], modality.patch, str(self.config.orientation))
        except ValueError as error:
            raise UserError(str(error)) from None
        if not torch.isfinite(images).all():
            raise UserError("images with pixels that are not finite; 0, the sky, would be right")
        recipe = self.recipe(whole.tokens)
        part = prefix_grid(whole, recipe.reads)
        margin = (whole.side - part.side) // 2
        centre = images[:, margin : margin + part.side, margin : margin + part.side]
        size = self.batch(recipe.reads)
        found: dict[str, list[Tensor]] = {name: [] for name in recipe.columns}
        for start in range(0, len(centre), size):
            batch = centre[start : start + size].to(self.device)
            patches = part.cut(batch)[:, : recipe.reads]
            for name, embedding in self.embed_patches(patches, recipe).items():
                found[name].append(embedding.cpu())
        arrays = {
            name: torch.cat(parts).numpy() if parts else np.empty((0, *shape), np.float32)
            for (name, parts), shape in zip(found.items(), recipe.columns.values(), strict=True)
        }
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays

    def recipe(self, available: int) -> Recipe:
        """What is made of images of so many tokens.

        Raises:
            UserError: what was asked for cannot be made of them.
        """
        if available > self.config.block_size:
            raise UserError(f"{available} tokens; the model reads {self.config.block_size} at most")
        return make_recipe(self.config, available, self._layers, self._pooling, self._tokens)

    def batch(self, tokens: int) -> int:
        """Images at once, of which so many tokens are read."""
        if isinstance(self._batch, int):
            return self._batch
        on_cpu = self.device.type == "cpu"
        most = CORE_TOKENS * torch.get_num_threads() if on_cpu else GPU_TOKENS
        return 1 << (max(1, most // tokens).bit_length() - 1)

    def embed_patches(self, patches: Tensor, recipe: Recipe) -> dict[str, Tensor]:
        """The embeddings of images that are cut already.

        Args:
            patches: (images, tokens, values), uint8 or fluxes, in spiral order, on any device; as
                many tokens as the recipe reads.
            recipe: what to make.

        Returns:
            (images, *shape) of each of the recipe's columns, fp32, on the model's device.

        Raises:
            UserError: there is no memory for a single image.
        """
        parts, start = [], 0
        while start < len(patches):
            batch = patches[start : start + self.batch(patches.shape[1])]
            try:
                parts.append(self._embed(batch, recipe))
                start += len(batch)
                continue
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1:
                    reason = str(error).splitlines()[0]
                    raise UserError(f"no memory for an image on {self.device} ({reason})") from None
            # only now, when the error is gone, is what it held on to free
            self._batch = len(batch) // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return {name: torch.cat([part[name] for part in parts]) for name in recipe.columns}

    @torch.inference_mode()
    def _embed(self, patches: Tensor, recipe: Recipe) -> dict[str, Tensor]:
        tokens = standardise(patches.to(self.device))
        states = self._states(tokens, recipe.layers)
        pooled = (recipe.pool(state[:, : recipe.tokens]) for state in states)
        return dict(zip(recipe.columns, pooled, strict=True))

    def _eager_states(self, tokens: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """The outputs of blocks, each from where the one before was taken."""
        states = [self._model.hidden_states(tokens, layers[0])]
        for before, layer in pairwise(layers):
            x = states[-1]
            for block in self._model.transformer.h[before + 1 : layer + 1]:
                x = block(x)
            states.append(x)
        return states


def check_batch(batch: int | str) -> None:
    """See that it is a number of images, or auto; raises UserError."""
    if batch != "auto" and (not isinstance(batch, int) or batch < 1):
        raise UserError(f"--batch {batch}: auto, or 1 or more, would be right")


def find_device(name: str) -> torch.device:
    """A device; of several GPUs the one that the launcher meant for this process.

    Raises:
        UserError: there is none of that name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            place = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
            device = torch.device("cuda", int(place) % max(1, torch.cuda.device_count()))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error)
        raise UserError(f"--device {name}: {reason}; auto or cpu would be right") from None
    return device


def find_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16.

    Raises:
        UserError: it is neither, nor auto.
    """
    if name == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "bf16" if half else "fp32"
    if name not in ("fp32", "bf16"):
        raise UserError(f"--precision {name}: auto, fp32 or bf16 would be right")
    return name


def weights_hash(model: AstroPT) -> str:
    """sha256 of a model's weights: the same whatever file they came from."""
    digest = hashlib.sha256(repr(model.config.architecture()).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype}".encode())
        flat = parameter.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _out_of_memory(error: RuntimeError) -> bool:
    # a processor's allocator has no error of its own for it
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
