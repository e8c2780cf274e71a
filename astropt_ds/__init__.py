"""AstroPT at scale: pretraining galaxy transformers on DeepSpeed ZeRO."""

__version__ = "0.1.0"
