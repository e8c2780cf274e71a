"""Small models whose parameters all matter, and their folders."""

import torch

from astropt_ds.config_source import load_config
from astropt_ds.model import AstroPT
from astropt_ds.model_folder.folder import write_folder

SHAPE = ("model.layers=3", "model.heads=4", "model.width=32", "data.image_size=96")


def small(tokeniser="aim", *overrides):
    config = load_config("1m", [f"model.tokeniser={tokeniser}", *SHAPE, *overrides]).model
    model = AstroPT(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # norms and biases leave their ones and zeros, too
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def write(folder, model, facts=None, **options):
    folder.mkdir(parents=True)
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    write_folder(folder, model.config, torch.float32, lambda: facts or {}, tensors, **options)
    return folder


def galaxies(dtype=torch.uint8):
    """(2, 96, 96, 3): not symmetric under transposition."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 96, 96, 3), generator=generator).to(dtype)
