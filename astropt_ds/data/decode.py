"""Bytes of an image file to pixels."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

JPEG_MAGIC = b"\xff\xd8"
COLOUR_MODES = ("RGB", "RGBA", "P")


class BadImageError(ValueError):
    """An image that cannot be used; the message says why."""


def decode(data: bytes) -> np.ndarray:
    """Decode a JPEG, PNG or any other file Pillow knows.

    Args:
        data: the file's bytes.

    Returns:
        (height, width, 3) uint8, red first. An alpha channel is dropped, a palette resolved.

    Raises:
        BadImageError: not an image, damaged, or not a colour image.
    """
    if not data:
        raise BadImageError("is empty")
    if data[:2] == JPEG_MAGIC:
        try:
            colourspace = simplejpeg.decode_jpeg_header(data)[2]
            if colourspace == "Gray":
                raise BadImageError("has 1 channel; 3 would be right")
            if colourspace != "CMYK" and colourspace != "YCCK":  # those are left to Pillow
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except BadImageError:
            raise
        except ValueError as error:
            raise BadImageError(f"cannot be decoded ({error})") from None
    return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in (*COLOUR_MODES, "CMYK"):
                raise BadImageError(f"has mode {image.mode}; a colour image would be right")
            return np.asarray(image.convert("RGB"))
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("cannot be decoded (no image format that Pillow knows)") from None
    except Exception as error:  # Pillow's plugins raise a dozen kinds on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImageError(f"cannot be decoded ({reason})") from None
