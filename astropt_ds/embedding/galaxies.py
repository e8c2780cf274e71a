"""What every input offers: galaxies by number, as patches, with what is known about each."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple, Protocol

import numpy as np

from astropt_ds.embedding.view import View


class Failure(NamedTuple):
    """A galaxy that has no embedding."""

    id: str
    file: str  # where its image lies
    reason: str
    unreachable: bool = False  # its image was not to be had as it was written: it may be later


class Reading(NamedTuple):
    """Galaxies on their way; the patches of those that failed are zeros.

    Attributes:
        ids: of all of them, in order.
        cells: of each, by the names of the columns carried along.
        failures: by place among them.
        unlisted: how many the catalogue that goes along does not know.
    """

    ids: list[str]
    cells: list[dict[str, Any]]
    failures: dict[int, Failure]
    unlisted: int = 0


class Galaxies(Protocol):
    """An input, opened. A fork of the process can read from it."""

    @property
    def what(self) -> str:
        """It is, as the user calls it."""

    @property
    def rows(self) -> int:
        """Galaxies in it, of which only some may be asked for."""

    @property
    def missing(self) -> list[str]:
        """Ids that were asked for and that it does not hold."""

    @property
    def identity(self) -> dict[str, Any]:
        """Changes when the galaxies, their order or their pixels do; as JSON holds it."""

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the images' channels."""

    @property
    def dtype(self) -> str:
        """Of the pixels: uint8 or float32."""

    @property
    def size(self) -> int:
        """Bytes of all images, about."""

    def sides(self) -> Counter[int]:
        """How many images have how many pixels along their shorter side, of some from all over.

        Raises:
            UserError: none of those looked at is an image.
        """

    def types(self) -> dict[str, Any]:
        """The Arrow type of each column that is carried along.

        Raises:
            UserError: a column that was asked for is not there.
        """

    def read(self, first: int, stop: int, ahead: int, view: View, out: np.ndarray) -> Reading:
        """Look at the galaxies [first, stop).

        Args:
            first, stop: numbers.
            ahead: the number up to which this process will be asked for next.
            view: what to take of each image.
            out: (stop - first, *view.shape), where the patches go.
        """

    def close(self) -> None:
        """Close all files."""
