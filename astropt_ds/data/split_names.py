"""Which split a file is in, as its name or its folder's tells."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from astropt_ds.data.manifest import SPLITS

SPLIT_OF_WORD = {name: name for name in SPLITS} | dict.fromkeys(
    ("validation", "valid", "dev"), "val"
)
# a word of its own: in galaxies-train-0001 and train_12, in neither trainee nor contest
_WORD = re.compile(f"(?<![a-z])({'|'.join(SPLIT_OF_WORD)})(?![a-z])", re.IGNORECASE)


def split_in_path(path: str) -> str | None:
    """The split that the outermost folder that names one, or else the file's name, tells.

    ``data/train-00000-of-00123.parquet`` is in the training split, as is ``train/test-field.jpg``;
    ``training/a.jpg`` is in none, nor is what names two at once.
    """
    for part in PurePosixPath(path).parts:
        told = {SPLIT_OF_WORD[word.lower()] for word in _WORD.findall(part)}
        if told:
            return told.pop() if len(told) == 1 else None
    return None
