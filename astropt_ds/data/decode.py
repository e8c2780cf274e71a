"""Bytes of an image file to pixels."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

JPEG_MAGIC = b"\xff\xd8"
NPY_MAGIC = b"\x93NUMPY"
MIN_HEIGHT = 16  # pixels: no patch fits into less
COLOUR_MODES = ("RGB", "RGBA", "P")


class BadImageError(ValueError):
    """An image that cannot be used; the message says why."""


def decode(data: bytes, buffer: np.ndarray | None = None) -> np.ndarray:
    """Decode a JPEG, a PNG, any other file Pillow knows, or fluxes in numpy's format.

    Args:
        data: the file's bytes.
        buffer: uint8 memory for the pixels of a JPEG, if they fit: what is returned then lies in
            it, and fresh memory for every image is saved.

    Returns:
        (height, width, 3) uint8, red first, an alpha channel dropped, a palette resolved; or
        (height, width, channels) float32 for fluxes.

    Raises:
        BadImageError: not an image, damaged, or not a colour image.
    """
    if not data:
        raise BadImageError("is empty")
    if data.startswith(NPY_MAGIC):
        return _decode_fluxes(data)
    if data[:2] == JPEG_MAGIC:
        try:
            height, width, colourspace, _ = simplejpeg.decode_jpeg_header(data)
            if colourspace == "Gray":
                raise BadImageError("has 1 channel; 3 would be right")
            if colourspace != "CMYK" and colourspace != "YCCK":  # those are left to Pillow
                if buffer is not None and buffer.nbytes < height * width * 3:
                    buffer = None
                return simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=buffer)
        except BadImageError:
            raise
        except ValueError as error:
            raise BadImageError(f"cannot be decoded ({error})") from None
    return _decode_with_pillow(data)


def encode_fluxes(image: np.ndarray) -> bytes:
    """The npy file of an image of fluxes, (height, width, channels); stored as float32."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(image, dtype="<f4"))
    return file.getvalue()


def check_finite(image: np.ndarray, keep: bool) -> None:
    """See that an image's values are finite, or at least one of them if gaps are to be kept.

    Raises:
        BadImageError: they are not.
    """
    bad = image.size - int(np.isfinite(image).sum())
    if bad and not keep:
        raise BadImageError(f"{bad} values are not finite; --nan zero would keep it")
    if bad == image.size:
        raise BadImageError("holds no finite value")


def _decode_fluxes(data: bytes) -> np.ndarray:
    try:
        image = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a damaged header raises whatever its text makes Python raise
        raise BadImageError(f"cannot be decoded ({' '.join(str(error).split())})") from None
    if image.ndim != 3 or image.dtype != np.float32:
        raise BadImageError(
            f"holds {image.dtype} of shape {image.shape}; float32 of (height, width, channels) "
            "would be right"
        )
    if image.shape[0] < MIN_HEIGHT <= image.shape[2]:
        raise BadImageError(
            f"has shape {image.shape}, (channels, height, width) by its looks; "
            "(height, width, channels) would be right"
        )
    return image


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
