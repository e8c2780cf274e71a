"""The central pixels of an image file, from no more of a JPEG than holds them.

A JPEG is decoded from its top. With a smaller height in its header the decoder stops below the
centre, and never looks at what is left. Damage, there or above, then goes unnoticed more often than
in a decode of the whole: this is for bytes that a checksum has verified.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import simplejpeg

from astropt_ds.data.decode import JPEG_MAGIC, BadImageError, decode
from astropt_ds.tokens import centre_crop

SEQUENTIAL = (0xC0, 0xC1)  # SOF markers: Huffman-coded from the top row to the bottom row
OTHER_FRAMES = (0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
START_OF_SCAN = 0xDA
# Interpolated colour looks one row beyond.
MARGIN = 1


class Frame(NamedTuple):
    """What the header of a JPEG says that is decoded row by row."""

    place: int  # of the height's two bytes in the file
    height: int
    width: int


def decode_centre(
    data: bytes,
    side: int,
    smallest: int | None = None,
    strict: bool = False,
    buffer: np.ndarray | None = None,
) -> np.ndarray:
    """The central ``side x side`` pixels of an image file.

    Args:
        data: the file's bytes.
        side: pixels.
        smallest: images with a shorter side are refused; ``side`` if None.
        strict: decode all of the file, which finds damage anywhere in it; otherwise bytes that are
            known to be whole give the same pixels in less time.
        buffer: uint8 memory for the decoder, as :func:`~astropt_ds.data.decode.decode` takes it.

    Returns:
        (side, side, channels): the pixels that ``centre_crop(decode(data), side)`` has.

    Raises:
        BadImageError: it cannot be decoded, or is smaller.
    """
    smallest = smallest or side
    frame = None if strict else _frame(data)
    image = None
    if frame and min(frame.height, frame.width) >= smallest:
        image = _upper_rows(data, frame, side, buffer)
    if image is None:
        image = decode(data, buffer)
        try:
            centre_crop(image, smallest)
        except ValueError as error:
            raise BadImageError(str(error)) from None
        return centre_crop(image, side)
    assert frame is not None
    top, left = (frame.height - side) // 2, (frame.width - side) // 2
    return image[top : top + side, left : left + side]


def _upper_rows(
    data: bytes, frame: Frame, side: int, buffer: np.ndarray | None
) -> np.ndarray | None:
    """The rows down to those of the centre, or None where all of the file is wanted for them."""
    rows = (frame.height - side) // 2 + side + MARGIN
    if rows >= frame.height:
        return None
    lowered = data[: frame.place] + struct.pack(">H", rows) + data[frame.place + 2 :]
    if buffer is not None and buffer.nbytes < 3 * rows * frame.width:
        buffer = None
    try:
        # not strict: it would complain of the bytes that are left
        return simplejpeg.decode_jpeg(lowered, colorspace="RGB", strict=False, buffer=buffer)
    except ValueError:
        return None  # the decode of the whole knows what to say


def _frame(data: bytes) -> Frame | None:
    """The frame of a colour JPEG whose rows come in order, in one scan; None for others."""
    if data[:2] != JPEG_MAGIC:
        return None
    at, frame, components = 2, None, 0
    try:
        while True:
            while data[at + 1] == 0xFF:  # fill bytes
                at += 1
            if data[at] != 0xFF:
                return None
            marker, (size,) = data[at + 1], struct.unpack_from(">H", data, at + 2)
            if marker in OTHER_FRAMES:
                return None
            if marker in SEQUENTIAL:
                _, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
                frame = Frame(at + 5, height, width)
            if marker == START_OF_SCAN:
                whole = components == 3 == data[at + 4]  # all of three colours in this scan
                return frame if whole else None
            at += 2 + size
    except (IndexError, struct.error, ValueError):  # it ends too soon
        return None
