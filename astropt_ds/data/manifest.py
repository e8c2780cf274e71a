"""What a data set says about itself: ``manifest.json`` and the index of each split.

The manifest is small: a line a shard. The index, one row an image, lies beside it as
``SPLIT.index.npy``: where the image's bytes lie in its shard, their crc32, its pixels. Ten million
rows are mapped into memory, never read as a whole; each shard's rows have a checksum of their own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from astropt_ds.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "astropt_ds-shards-1"
SPLITS = ("train", "val", "test")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _within(name: str) -> str:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name!r} lies outside the data set")
    return name


FileName = Annotated[str, AfterValidator(_within)]


class ShardEntry(_Entry):
    """One tar file."""

    name: FileName
    samples: int
    bytes: int
    sha256: str
    smallest: int  # pixels along the shortest side of any of its images; 0 if it has none
    index_crc32: int  # of its rows in the index


class SplitEntry(_Entry):
    """One split: its shards in order, and its index."""

    samples: int
    index: FileName
    index_bytes: int
    index_sha256: str
    shards: list[ShardEntry]


class Manifest(_Entry):
    """What ``manifest.json`` holds.

    Attributes:
        dtype: of the pixels.
        bands: a name a channel, in the order of the channels.
        nan: what a pixel that is not finite means: 8-bit images have ``none``, ``zero`` is read as
            0, the sky of a background-subtracted image.
        stretch: how 8-bit images were made from fluxes, with its parameters; None where they were
            8-bit images before.
        root: the folder of the shards where they do not lie beside the manifest.
    """

    format: str
    dtype: Literal["uint8", "float32"]
    channels: int
    bands: list[str]
    nan: Literal["none", "zero"]
    stretch: dict[str, Any] | None = None
    root: str | None = None
    splits: dict[str, SplitEntry]

    def save(self, folder: Path) -> None:
        """Write the manifest; the same data give the same bytes."""
        (folder / MANIFEST).write_text(json.dumps(self.model_dump(), indent=1) + "\n")

    def hash(self, splits: tuple[str, ...]) -> str:
        """Changes when a pixel, key, shard or their order does, or how pixels are read."""
        pixels = [self.dtype, self.channels, self.bands, self.nan]
        # named one by one: what a later version adds must not keep old runs from going on
        shards = [
            [name, shard.name, shard.samples, shard.sha256, shard.index_crc32]
            for name in splits
            for shard in self.splits[name].shards
        ]
        return hashlib.sha256(json.dumps([pixels, shards]).encode()).hexdigest()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """A data set's manifest from its bytes.

    Args:
        data: the file.
        where: its name, for messages.

    Raises:
        UserError: not a manifest, or of another format.
    """
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: not a manifest ({key or 'JSON'}: {first['msg']})") from None
    if manifest.format != FORMAT:
        raise UserError(f"{where}: format {manifest.format!r}; {FORMAT!r} would be right")
    return manifest


MAX_SIDE = np.iinfo(np.uint16).max  # pixels, as the index holds them


def index_dtype(key_bytes: int) -> np.dtype[Any]:
    """The row of an index: key, where the image's bytes lie in its shard, checksum, pixels."""
    return np.dtype(
        [
            ("key", f"S{max(key_bytes, 1)}"),
            ("offset", "<u8"),
            ("size", "<u4"),
            ("crc32", "<u4"),
            ("width", "<u2"),
            ("height", "<u2"),
        ]
    )
