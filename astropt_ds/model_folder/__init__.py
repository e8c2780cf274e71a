"""Model folders: config.json, safetensors, a model card and code for transformers.

What every tool takes as a model. ``folder`` writes them whole; ``config_json`` and ``weights`` read
and write their parts.
"""
