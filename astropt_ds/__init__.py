"""AstroPT at scale: pretraining galaxy transformers on DeepSpeed ZeRO."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astropt_ds.convert.load import load_model, save_model
    from astropt_ds.embedding.embedder import Embedder
    from astropt_ds.model_folder.release import Release
    from astropt_ds.table.read import read_embeddings

__all__ = ["Embedder", "Release", "__version__", "load_model", "read_embeddings", "save_model"]
__version__ = "0.1.0"

# Imported when asked for: a module of the package is not to import all that these need.
HOMES = {
    "load_model": "astropt_ds.convert.load",
    "save_model": "astropt_ds.convert.load",
    "Embedder": "astropt_ds.embedding.embedder",
    "read_embeddings": "astropt_ds.table.read",
    "Release": "astropt_ds.model_folder.release",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
