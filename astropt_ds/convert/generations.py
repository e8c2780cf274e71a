"""The three AstroPT generations: how each names its parameters and describes its model.

v1 is the paper's, v2 the package's 2.0.x, v3 3.0 and later. Our own names are those of v3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from astropt_ds.config import ModelConfig
from astropt_ds.convert.unpickle import Stub
from astropt_ds.errors import UserError

MODALITY, REGISTRY = "astropt.model.ModalityConfig", "astropt.model.ModalityRegistry"
COMPILED = "_orig_mod."  # what torch.compile puts in front of a module's names, at any depth

# (ours, the generation's), each the beginning of names
PREFIXES = {
    "v1": (
        ("encoders.images.", "transformer.wte."),
        ("embedders.images.wpe.", "transformer.wpe."),
        ("decoders.images.", "lm_head."),
    ),
    "v2": (
        ("encoders.", "transformer.wte."),
        ("embedders.", "transformer.wpe."),
        ("decoders.", "lm_head."),
    ),
    "v3": (),
}
# The order in which v3 registers its modules, and so numbers its optimizer's state; ours is v1's
# and v2's.
V3_ORDER = ("transformer", "encoders", "decoders", "embedders")
# model_args that mean nothing to the weights, or only what this package does where so valued
HARMLESS = {"dropout", "mae_mask_ratio", "norm_pix_loss", "lora_alpha", "lora_dropout"}
EXPECTED: dict[str, tuple[Any, ...]] = {
    "attn_type": ("causal",),
    "objective": ("ar",),
    "bias": (False,),
    "lora_r": (0,),
    "use_qlora": (False,),
    "backbone": ("native",),
    "llm_model_name": (None,),
}
NUMBERS = {"layers": "n_layer", "heads": "n_head", "width": "n_embd", "block_size": "block_size"}
UNDERSTOOD = {*NUMBERS.values(), "n_chan", "patch_size", "modalities", "tokeniser"}


def upstream_name(name: str, generation: str) -> str:
    """What a generation calls one of our parameters."""
    for ours, theirs in PREFIXES[generation]:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def our_name(name: str, generation: str) -> str:
    """The inverse of :func:`upstream_name`."""
    for ours, theirs in PREFIXES[generation]:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def upstream_order(names: list[str], generation: str) -> list[str]:
    """Our names in the order in which a generation has them."""
    if generation != "v3":
        return names
    return sorted(names, key=lambda name: V3_ORDER.index(name.partition(".")[0]))


def generation_of(names: list[str]) -> str | None:
    """Whose names they are, without what torch.compile adds; None if nobody's."""
    if any(name.startswith("encoders.") for name in names):
        return "v3"
    if any(re.match(r"transformer\.wte\.\d+\.", name) for name in names):
        return "v1"
    if any(name.startswith("transformer.wte.") for name in names):
        return "v2"
    return None


def read_model(
    args: Mapping[str, Any],
    registry: Any,
    generation: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> ModelConfig:
    """The model that an AstroPT checkpoint describes.

    Args:
        args: its ``model_args``.
        registry: its ``modality_registry``, if it has one.
        generation: of its names.
        shapes: of its tensors.

    Raises:
        UserError: it cannot be expressed; all reasons are named.
    """
    problems = [
        f"model_args.{key}={_shown(args[key])}, only {fits[0]!r} is read"
        for key, fits in EXPECTED.items()
        if key in args and args[key] not in fits
    ]
    unknown = [key for key in args if key not in UNDERSTOOD | HARMLESS | EXPECTED.keys()]
    problems += [f"model_args.{key}={_shown(args[key])} is not known" for key in unknown]
    wrong = [key for key in NUMBERS.values() if type(args.get(key, 1)) is not int]
    problems += [f"model_args.{key}={_shown(args[key])} is no whole number" for key in wrong]
    tokeniser = "relu"
    if generation != "v1":
        first = upstream_name("encoders.images.", generation)
        tokeniser = "aim" if f"{first}c_proj.weight" in shapes else "affine"
        if args.get("tokeniser", tokeniser) != tokeniser:
            told = _shown(args["tokeniser"])
            problems.append(f"model_args.tokeniser={told}, but its tensors are {tokeniser}'s")
    try:
        modality = _images(args, registry, generation, shapes)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    if isinstance(layers := args.get("n_layer"), int) and layers > len(shapes):
        raise UserError(f"model_args.n_layer={_shown(layers)} of {len(shapes)} tensors")
    values = {ours: args[theirs] for ours, theirs in NUMBERS.items() if theirs in args}
    values |= {"tokeniser": tokeniser, "modalities": {"images": modality}}
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        keys = [str(item["loc"][0]) if item["loc"] else "" for item in error.errors()]
        faults = [
            f"{NUMBERS.get(key, key)} {item['msg']}"
            for key, item in zip(keys, error.errors(), strict=True)
        ]
        raise UserError("model_args: " + "; ".join(faults)) from None


def _shown(value: Any) -> str:
    """A value in a message: short, and nothing of what a forged one may hold."""
    plain = isinstance(value, str | int | float | bool | None)
    return repr(value)[:60] if plain else f"a {type(value).__name__}"


def _images(
    args: Mapping[str, Any],
    registry: Any,
    generation: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """Patch and channels of the images, which must be the only modality.

    Raises:
        ValueError: they are not, or it cannot be told.
    """
    if generation == "v1":
        return {"patch": args.get("patch_size", 16), "channels": args.get("n_chan", 3)}
    described = getattr(registry, "modalities", None) or args.get("modalities")
    if isinstance(described, dict):
        described = list(described.values())
    if not described:  # an early v2 file: the tensors tell
        return _images_of_shapes(args, generation, shapes)
    if not isinstance(described, list) or not all(isinstance(m, Stub) for m in described):
        raise ValueError("modalities are no list of ModalityConfig")
    names = [getattr(m, "name", None) for m in described]
    if names != ["images"]:
        raise ValueError(f"modalities {[*map(str, names)]}, only ['images'] is read")
    values = vars(described[0])
    for key, fits in {"embed_pos": True, "vocab_size": 0}.items():
        if values.get(key, fits) != fits:
            raise ValueError(f"modality images: {key}={values[key]!r}, only {fits!r} is read")
    return _patch(values.get("input_size"), values.get("patch_size"))


def _images_of_shapes(
    args: Mapping[str, Any], generation: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    first = upstream_name("encoders.", generation)
    names = {
        name.removeprefix(first).partition(".")[0] for name in shapes if name.startswith(first)
    }
    if names != {"images"}:
        raise ValueError(f"modalities {sorted(names)}, only ['images'] is read")
    shape = shapes.get(f"{first}images.c_fc.weight", ())
    channels = args.get("n_chan")
    if len(shape) != 2 or not isinstance(channels, int) or channels < 1:
        raise ValueError("modalities are not described, and n_chan does not tell the patch")
    return _patch(shape[1], math.isqrt(shape[1] // channels))


def _patch(size: Any, patch: Any) -> dict[str, int]:
    if not isinstance(size, int) or not isinstance(patch, int) or patch < 1 or size % patch**2:
        raise ValueError(
            f"modality images: input_size={size!r} is no patch of patch_size={patch!r}"
        )
    return {"patch": patch, "channels": size // patch**2}


def inexpressible(model: ModelConfig, generation: str) -> str | None:
    """Why a generation has no such model, and what would be right; None if it has."""
    reasons = []
    tokenisers = ("relu",) if generation == "v1" else ("aim", "affine")
    if model.tokeniser not in tokenisers:
        right = "astropt-v1" if model.tokeniser == "relu" else "astropt-v2 or astropt-v3"
        reasons.append(f"tokeniser {model.tokeniser} is no {generation}'s ({right} would be right)")
    reads = "rows" if generation == "v1" else "columns"
    if model.orientation != reads:
        reasons.append(f"{generation} reads {reads} first, the model {model.orientation}")
    if model.attention != "causal":
        reasons.append(f"attention {model.attention} is not written, only causal")
    return "; ".join(reasons) or None


def write_model(model: ModelConfig, generation: str) -> tuple[dict[str, Any], Any]:
    """A generation's ``model_args``, and its ``modality_registry`` from v2 on.

    The instances in them are of the stand-ins :class:`ModalityConfig` and
    :class:`ModalityRegistry`, which :func:`~astropt_ds.convert.torch_write.write_torch_file` writes
    as AstroPT's own.
    """
    images = model.images
    args: dict[str, Any] = {
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_embd": model.width,
        "n_chan": images.channels,
        "block_size": model.block_size,
        "dropout": 0.0,
    }
    if generation == "v1":
        return {**args, "patch_size": images.patch}, None
    modality = ModalityConfig()
    vars(modality).update(
        name="images",
        input_size=images.input_size,
        pos_input_size=1,
        patch_size=images.patch,
        embed_pos=True,
        loss_weight=1.0,
    )
    args |= {"modalities": [modality], "attn_type": "causal"}
    if generation == "v3":
        vars(modality).update(vocab_size=0)
        args |= {"objective": "ar", "mae_mask_ratio": 0.0, "norm_pix_loss": False}
    if generation == "v3" or model.tokeniser != "aim":  # the first of 2.0.x know only that one
        args["tokeniser"] = model.tokeniser
    registry = ModalityRegistry()
    vars(registry).update(modalities={"images": modality})
    return args, registry


class ModalityConfig:
    """Stands in for AstroPT's class of that name."""


class ModalityRegistry:
    """Stands in for AstroPT's class of that name."""


STAND_INS = {ModalityConfig: MODALITY, ModalityRegistry: REGISTRY}
