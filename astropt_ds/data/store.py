"""Where the files of a data set are: what that has to offer, and the folder of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from astropt_ds.data.manifest import MANIFEST, Manifest, ShardEntry, SplitEntry, parse_manifest
from astropt_ds.errors import UserError


class Store(Protocol):
    """A data set's files; ``str`` of it is what the user calls it."""

    manifest: Manifest

    def file(self, name: str) -> str:
        """A file's full name, for messages."""

    def open_index(self, split: SplitEntry) -> int:
        """A descriptor of a split's index; raises UserError."""

    def open_shard(self, shard: ShardEntry) -> int:
        """A descriptor of a shard; raises UserError or OSError."""

    def read_ahead(self, shards: Iterable[ShardEntry]) -> None:
        """Have these shards at hand soon."""

    def check(self, split: SplitEntry, part: slice) -> None:
        """Look for a part of a split's shards before a run needs them; raises UserError."""

    def cached_bytes(self, split: SplitEntry, window: int) -> int:
        """What a run needs of the local cache for a split."""


class Folder:
    """A data set in a folder that this machine sees.

    Raises:
        UserError: no folder, no manifest, or not one of ours.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not folder.is_dir():
            raise UserError(f"{folder}: is no folder; tools/make_shards.py makes one")
        if not path.is_file():
            raise UserError(
                f"{folder}: no {MANIFEST}, so no shards that are known; "
                "tools/make_shards.py makes them, tools/verify_shards.py --index lists yours"
            )
        self.manifest = parse_manifest(path.read_bytes(), str(path))
        self.shards = Path(self.manifest.root) if self.manifest.root else folder

    def __str__(self) -> str:
        return str(self.folder)

    def file(self, name: str) -> str:
        """A file's full name, for messages."""
        return str((self.folder if name.endswith(".npy") else self.shards) / name)

    def index(self, split: SplitEntry) -> Path:
        """The local path of a split's index."""
        path = self.folder / split.index
        if not path.is_file() or path.stat().st_size != split.index_bytes:
            raise UserError(f"{path}: missing, or not the index that the manifest describes")
        return path

    def shard(self, shard: ShardEntry) -> Path:
        """The local path of a shard."""
        return self.shards / shard.name

    def open_index(self, split: SplitEntry) -> int:
        """A descriptor of a split's index."""
        return os.open(self.index(split), os.O_RDONLY)

    def open_shard(self, shard: ShardEntry) -> int:
        """A descriptor of a shard."""
        return os.open(self.shard(shard), os.O_RDONLY)

    def read_ahead(self, shards: Iterable[ShardEntry]) -> None:
        """Nothing to do: they are at hand."""

    def cached_bytes(self, split: SplitEntry, window: int) -> int:
        """Nothing: the folder is at hand."""
        return 0

    def check(self, split: SplitEntry, part: slice) -> None:
        """Every shard of a part of the split is there with its size, and no other one beside."""
        for shard in split.shards[part]:
            path = self.shard(shard)
            if not path.is_file():
                raise UserError(f"{path}: missing; the manifest lists it")
            if path.stat().st_size != shard.bytes:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes; the manifest says {shard.bytes}"
                )
        if extra := self.unlisted():
            raise UserError(
                f"{extra[0]}: is not in the manifest ({len(extra)} such in all); move it away, "
                "or list all shards anew with tools/verify_shards.py --index"
            )

    def unlisted(self) -> list[Path]:
        """Tar files beside the shards that the manifest does not list."""
        listed = {self.shard(s) for entry in self.manifest.splits.values() for s in entry.shards}
        folders = {path.parent for path in listed}
        return sorted(
            path for folder in folders for path in folder.glob("*.tar") if path not in listed
        )
