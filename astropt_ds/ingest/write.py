"""Pictures to samples, and samples to a shard and a record of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from astropt_ds.data.decode import JPEG_MAGIC, BadImageError, check_finite, decode, encode_fluxes
from astropt_ds.data.manifest import MAX_SIDE
from astropt_ds.data.rejected import Rejected
from astropt_ds.data.shards import Sample, write_shard
from astropt_ds.data.stretch import Stretch
from astropt_ds.ingest.cells import key_of, labels_of
from astropt_ds.ingest.plan import Part, place_of
from astropt_ds.ingest.source import FILE, ID, Facts, Picture, Source
from astropt_ds.ingest.survey import BESIDE
from astropt_ds.ingest.unfinished import save_record

PNG_MAGIC = b"\x89PNG"
JPEG_QUALITY = 95  # of stretched fluxes


@dataclass(frozen=True)
class Writer:
    """Makes shards in a folder; what every process needs to know.

    Attributes:
        source: of the images.
        facts: what they have in common.
        stretch: to 8-bit colour, if any.
        id_column: of the catalogue.
        keep_nan: store images with pixels that are not finite, for these to be read as zero.
        min_side: smaller images are rejected; pixels.
        folder: of the shards.
    """

    source: Source
    facts: Facts
    stretch: Stretch | None
    id_column: str
    keep_nan: bool
    min_side: int
    folder: Path

    def write(self, part: Part) -> int:
        """Write a shard and then its record; returns how many images it was to hold."""
        rejected: list[Rejected] = []
        state = self.source.state(part.rows)
        shard = write_shard(self.folder / f"{part.name}.tar", self._samples(part, rejected))
        save_record(self.folder, part.name, shard, rejected, state)
        return len(part.rows)

    def _samples(self, part: Part, rejected: list[Rejected]) -> Iterator[Sample]:
        labels = {}
        if part.labels is not None:
            known = part.rows[ID][part.rows[BESIDE] >= 0]
            cells = map(labels_of, part.labels.to_dict("records"), repeat(self.id_column))
            labels = dict(zip(known, cells, strict=True))
        unnamed = part.rows[FILE].isna()
        for row in part.rows[unnamed].to_dict("records"):
            rejected.append(Rejected(row[ID], "", "has no file name"))
        for row, picture in self.source.read(part.rows[~unnamed], self.facts):
            identifier = row[ID]
            try:
                if isinstance(picture, BadImageError):
                    raise picture
                suffix, data, (height, width) = self._encoded(picture)
                if max(height, width) > MAX_SIDE:
                    raise BadImageError(f"is {width} x {height} pixels, larger than {MAX_SIDE}")
                if min(height, width) < self.min_side:
                    raise BadImageError(
                        f"is {width} x {height} pixels, smaller than {self.min_side}"
                    )
            except BadImageError as error:
                rejected.append(Rejected(identifier, place_of(row), str(error)))
                continue
            beside = labels_of(picture.labels, self.source.id_column)
            beside |= {**labels.get(identifier, {}), "id": identifier}
            yield Sample(key_of(identifier), suffix, data, beside, width, height)

    def _encoded(self, picture: Picture) -> tuple[str, bytes, tuple[int, int]]:
        """(suffix, bytes, (height, width)) of an image as it is stored."""
        pixels = picture.pixels
        if isinstance(pixels, bytes):  # stored as they are, once they are known to be an image
            image = decode(pixels)
            if image.dtype != np.uint8:
                raise BadImageError("holds fluxes; JPEG or PNG would be right")
            return picture.suffix or _suffix(pixels), pixels, image.shape[:2]
        size = pixels.shape[:2]
        if pixels.dtype == np.uint8:
            return "png", _png(pixels), size
        check_finite(pixels, self.keep_nan)
        if self.stretch:
            pixels = np.where(np.isfinite(pixels), pixels, 0)
        if self.stretch is None:
            return "npy", encode_fluxes(pixels), size
        image = self.stretch(pixels)
        return "jpg", simplejpeg.encode_jpeg(image, JPEG_QUALITY, colorsubsampling="444"), size


def _suffix(data: bytes) -> str:
    if data.startswith(JPEG_MAGIC):
        return "jpg"
    if data.startswith(PNG_MAGIC):
        return "png"
    raise BadImageError("is neither JPEG nor PNG")


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
