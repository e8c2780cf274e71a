import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from astropt_ds.data.decode import BadImageError, decode

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_a_jpeg_decodes_to_the_pixels_of_pillow(subsampling):
    data = simplejpeg.encode_jpeg(PIXELS, quality=85, colorsubsampling=subsampling)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data) - reference).max() <= 1


def test_a_progressive_jpeg_decodes():
    data = encoded(Image.fromarray(PIXELS), "JPEG", progressive=True)
    assert decode(data).shape == (24, 40, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_png_decodes_to_its_pixels(mode):
    image = Image.fromarray(PIXELS // 64 * 64).convert(mode)
    decoded = decode(encoded(image, "PNG"))
    assert decoded.dtype == np.uint8
    assert (decoded == np.asarray(image.convert("RGB"))).all()


def test_a_cmyk_jpeg_is_turned_into_rgb():
    flat = Image.new("RGB", (32, 32), (200, 100, 50)).convert("CMYK")
    assert np.abs(decode(encoded(flat, "JPEG")).mean((0, 1)) - (200, 100, 50)).max() < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_grey_image_is_refused(kind):
    with pytest.raises(BadImageError, match="has 1 channel|has mode L"):
        decode(encoded(Image.fromarray(PIXELS[..., 0]), kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_image_is_refused(kind):
    data = encoded(Image.fromarray(PIXELS), kind)
    for cut in (1, 3, 20, len(data) // 2):
        with pytest.raises(BadImageError, match="cannot be decoded"):
            decode(data[:cut])


def test_an_empty_file_is_refused():
    with pytest.raises(BadImageError, match="is empty"):
        decode(b"")


def test_what_is_no_image_is_refused():
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode(b"ra,dec\n10.0,2.0\n")
