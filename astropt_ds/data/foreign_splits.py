"""Which split each shard that others wrote belongs to: by its name, or by globs."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import NamedTuple

from astropt_ds.data.manifest import SPLITS
from astropt_ds.data.split_names import split_in_path
from astropt_ds.errors import UserError

COMPRESSED = re.compile(r"\.(tgz|tar\.[a-z0-9]+)$", re.IGNORECASE)


class Found(NamedTuple):
    """The shards of a folder.

    Attributes:
        splits: the shards' names in each split, relative to the folder, in order.
        named: whether the names tell the splits; if not, all shards are in ``train``.
        compressed: files that were passed over, since no image in them is one read away.
    """

    splits: dict[str, list[str]]
    named: bool
    compressed: int


def find_shards(folder: Path, globs: dict[str, str]) -> Found:
    """The tar files in a folder and below, by split.

    Args:
        folder: where to look.
        globs: {split: pattern of relative names}; names tell the splits if it is empty.

    Raises:
        UserError: there are none, or the globs do not put each into one split.
    """
    if not folder.is_dir():
        raise UserError(f"--index {folder}: is no folder")
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [name for name in files if name.endswith(".tar")]
    compressed = [name for name in files if COMPRESSED.search(name)]
    if not names:
        reason = "no *.tar in it or below"
        if compressed:
            reason += f"; {compressed[0]} is compressed ({len(compressed)} such): unpack to .tar"
        raise UserError(f"--index {folder}: {reason}")
    if globs:
        return Found(_by_globs(names, globs), True, len(compressed))
    told = [split_in_path(name) for name in names]
    named = None not in told
    splits = {
        split: [n for n, s in zip(names, told, strict=True) if (s if named else "train") == split]
        for split in SPLITS
    }
    return Found(splits, named, len(compressed))


def _by_globs(names: list[str], globs: dict[str, str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, glob in globs.items():
        splits[split] = [name for name in names if fnmatch.fnmatchcase(name, glob)]
        if not splits[split]:
            raise UserError(f"--{split} {glob!r}: matches none of {len(names)} shards")
    left = set(names)
    for split, matched in splits.items():
        if twice := [name for name in matched if name not in left]:
            raise UserError(f"--{split} {globs[split]!r}: {twice[0]} is in another split already")
        left -= set(matched)
    if left:
        options = ", ".join(f"--{split}" for split in SPLITS)
        raise UserError(f"{min(left)}: none of {options} matches it ({len(left)} such in all)")
    return splits
