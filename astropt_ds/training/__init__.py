"""Training: the engine, checkpoints, records and the run that ties them together."""

import os

import torch

# DeepSpeed picks its accelerator when it is first imported, and warns if it has to guess.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
