"""The model as a class of the transformers library.

The end of the code in a model folder, which :mod:`~astropt_ds.model_folder.remote_code` writes;
never imported by this package.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from astropt_ds.model import AstroPT


class Modality(dict):
    """One kind of observation, as config.json has it: patch and channels."""

    @property
    def patch(self) -> int:
        """Pixels along a patch."""
        return self["patch"]

    @property
    def channels(self) -> int:
        """Values of a pixel."""
        return self["channels"]

    @property
    def input_size(self) -> int:
        """Values in a token."""
        return self.patch * self.patch * self.channels


class AstroPTConfig(PretrainedConfig):
    """What config.json says of the model, each key an attribute.

    Args:
        modalities: patch and channels of each kind of observation.
        values: the other keys.
    """

    model_type = "astropt"

    def __init__(self, modalities: dict[str, dict[str, int]] | None = None, **values: Any) -> None:
        super().__init__(**values)
        self.modalities = {name: Modality(sizes) for name, sizes in (modalities or {}).items()}


class AstroPTModel(PreTrainedModel):
    """The model, with the parameter names and methods of :class:`AstroPT`.

    Args:
        config: as ``AutoConfig`` reads it.
    """

    config_class = AstroPTConfig
    _supports_sdpa = True
    _no_split_modules = ("Block",)

    def __init__(self, config: AstroPTConfig) -> None:
        super().__init__(config)
        for name, module in AstroPT(config).named_children():
            self.add_module(name, module)
        # from_pretrained builds on the meta device and then fills from a file
        self._from_file = self.transformer.ln_f.weight.is_meta
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing, since the layers initialise themselves; what a file lacks is not made up.

        Raises:
            ValueError: a file lacks weights.
        """
        own = next(module.parameters(recurse=False), None)
        if self._from_file and own is not None and not own.is_meta:
            name = next(name for name, known in self.named_modules() if known is module)
            raise ValueError(f"the file lacks weights of {name}")

    forward = AstroPT.forward
    tokens = AstroPT.tokens
    hidden_states = AstroPT.hidden_states
    blocks_until = AstroPT.blocks_until
