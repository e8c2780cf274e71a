"""AstroPT's checkpoints as they are documented, made without the code that is under test."""

from __future__ import annotations

import math
import sys
import types

import torch
import torch.nn.functional as F

# name: layers, heads, width, and parameters in all as v1, aim and affine models
SIZES = {
    "1m": (4, 8, 128, 1_198_592, 1_836_160, 1_115_264),
    "5m": (6, 8, 256, 5_707_008, 7_081_216, 5_377_280),
    "12m": (6, 8, 384, 12_344_832, 14_553_984, 11_604_864),
    "21m": (6, 8, 512, 21_505_792, 24_648_192, 20_191_744),
    "89m": (12, 12, 768, 89_873_664, 95_177_472, 86_919_936),
    "309m": (24, 16, 1024, 309_910_272, 317_768_704, 304_661_504),
    "830m": (16, 8, 2048, 831_599_360, 853_608_448, 810_616_832),
    "2100m": (26, 32, 2560, 2_084_194_048, 2_115_637_760, 2_051_412_480),
}


def shapes(generation, layers, width, tokeniser="aim", block_size=1024, patch=768):
    """Every key of a generation's state dict with its shape, in the order of its modules."""
    d, p, t = width, patch, block_size
    if generation == "v1":
        first = {
            **{"transformer.wte.0.weight": (d, p), "transformer.wte.0.bias": (d,)},
            **{"transformer.wte.2.weight": (d, d), "transformer.wte.2.bias": (d,)},
            "transformer.wpe.weight": (t, d),
        }
        head = {
            **{"lm_head.0.weight": (2 * d, d), "lm_head.0.bias": (2 * d,)},
            **{"lm_head.2.weight": (d, 2 * d), "lm_head.2.bias": (d,)},
            **{"lm_head.4.weight": (p, d), "lm_head.4.bias": (p,)},
        }
    else:
        names = {
            "v2": ("transformer.wte.images", "transformer.wpe.images", "lm_head.images"),
            "v3": ("encoders.images", "embedders.images", "decoders.images"),
        }
        encoder, embedder, decoder = names[generation]
        if tokeniser == "aim":
            encoders = {
                f"{encoder}.c_fc.weight": (4 * d, p),
                f"{encoder}.c_proj.weight": (d, 4 * d),
            }
            head = {f"{decoder}.c_fc.weight": (4 * d, d), f"{decoder}.c_proj.weight": (p, 4 * d)}
        else:
            encoders = {f"{encoder}.c_fc.weight": (d, p)}
            head = {f"{decoder}.c_fc.weight": (p, d)}
        first = {**encoders, f"{embedder}.wpe.weight": (t, d)}
    trunk = {}
    for i in range(layers):
        trunk |= {
            f"transformer.h.{i}.ln_1.weight": (d,),
            f"transformer.h.{i}.attn.c_attn.weight": (3 * d, d),
            f"transformer.h.{i}.attn.c_proj.weight": (d, d),
            f"transformer.h.{i}.ln_2.weight": (d,),
            f"transformer.h.{i}.mlp.c_fc.weight": (4 * d, d),
            f"transformer.h.{i}.mlp.c_proj.weight": (d, 4 * d),
        }
    trunk["transformer.ln_f.weight"] = (d,)
    if generation == "v3":
        embedders = {k: v for k, v in first.items() if k.startswith("embedders")}
        encoders = {k: v for k, v in first.items() if k.startswith("encoders")}
        return {**trunk, **encoders, **head, **embedders}
    return {**first, **trunk, **head}


def random_state(generation, layers, width, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1)
        for name, shape in shapes(generation, layers, width, **options).items()
    }


def v1_states(state, tokens, layers, heads):
    """The documented formulas of v1, written out: (batch, tokens, values) to the output of the last
    block, (batch, tokens, width)."""
    w = state
    length = tokens.shape[1]
    x = F.relu(tokens @ w["transformer.wte.0.weight"].T + w["transformer.wte.0.bias"])
    x = F.relu(x @ w["transformer.wte.2.weight"].T + w["transformer.wte.2.bias"])
    x = x + w["transformer.wpe.weight"][:length]
    width = x.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(layers):
        block = f"transformer.h.{i}."
        normed = F.layer_norm(x, (width,), w[block + "ln_1.weight"], eps=1e-5)
        q, k, v = (normed @ w[block + "attn.c_attn.weight"].T).split(width, dim=-1)
        mixed = []
        for h in range(heads):
            own = slice(h * width // heads, (h + 1) * width // heads)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(width / heads)
            scores = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
            mixed.append(scores @ v[..., own])
        x = x + torch.cat(mixed, dim=-1) @ w[block + "attn.c_proj.weight"].T
        normed = F.layer_norm(x, (width,), w[block + "ln_2.weight"], eps=1e-5)
        a = normed @ w[block + "mlp.c_fc.weight"].T
        gelu = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        x = x + gelu @ w[block + "mlp.c_proj.weight"].T
    return x


def v1_predictions(state, tokens, layers, heads):
    """The documented formulas of v1, written out; (batch, tokens, values) to the same."""
    w, x = state, v1_states(state, tokens, layers, heads)
    x = F.layer_norm(x, x.shape[-1:], w["transformer.ln_f.weight"], eps=1e-5)
    x = F.relu(x @ w["lm_head.0.weight"].T + w["lm_head.0.bias"])
    x = F.relu(x @ w["lm_head.2.weight"].T + w["lm_head.2.bias"])
    return x @ w["lm_head.4.weight"].T + w["lm_head.4.bias"]


class ModalityConfig:
    """As v3 pickles it; ``astropt.model`` itself need not be installed to read one."""


class ModalityRegistry:
    """As v2 and v3 pickle it."""


def model_args(generation, layers, heads, width, **more):
    args = {"n_layer": layers, "n_head": heads, "n_embd": width, "n_chan": 3}
    args |= {"block_size": 1024, "dropout": 0.0}
    if generation == "v1":
        return {**args, "patch_size": 16, **more}
    images = ModalityConfig()
    vars(images).update(name="images", input_size=768, pos_input_size=1, patch_size=16)
    vars(images).update(embed_pos=True, loss_weight=1.0)
    return {**args, "modalities": [images], "attn_type": "causal", **more}


def save(path, state, args, **more):
    """A file as AstroPT's training script writes it, with instances of ``astropt.model``'s."""
    content = {"model": state, "model_args": args, "iter_num": 7, "config": {"batch_size": 8}}
    content["best_val_loss"] = torch.tensor(0.25)
    if args.get("modalities"):
        registry = ModalityRegistry()
        vars(registry).update(modalities={m.name: m for m in args["modalities"]})
        content["modality_registry"] = registry
    content |= more
    module = types.ModuleType("astropt.model")
    hidden = {name: sys.modules.get(name) for name in ("astropt", "astropt.model")}
    for cls in (ModalityConfig, ModalityRegistry):
        cls.__module__ = "astropt.model"
        setattr(module, cls.__name__, cls)
    try:
        sys.modules |= {"astropt": types.ModuleType("astropt"), "astropt.model": module}
        torch.save({k: v for k, v in content.items() if v is not None}, path)
    finally:
        for name, there in hidden.items():
            if there is None:
                del sys.modules[name]
            else:
                sys.modules[name] = there
    return path
