"""The centre of an image: the pixels that a decode of the whole has, whatever the file is like."""

import contextlib
import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from astropt_ds.data import centre
from astropt_ds.data.centre import decode_centre
from astropt_ds.data.decode import BadImageError, decode, encode_fluxes
from astropt_ds.tokens import centre_crop

SUBSAMPLINGS = ("444", "422", "420", "440", "411")


def noise(height, width, seed=0):
    """Colours that change from pixel to pixel: no neighbour can stand in for another."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def jpeg(image, subsampling="420", quality=90):
    return simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling=subsampling)


def by_pillow(image, kind="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, kind, **options)
    return file.getvalue()


def is_cut(data, side):
    """Whether the decoder is stopped early."""
    frame = centre._frame(data)
    return frame is not None and centre._upper_rows(data, frame, side, None) is not None


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", [(512, 512), (255, 255), (300, 211), (211, 300), (97, 64)])
def test_the_pixels_are_those_of_the_whole_decode(subsampling, size):
    data = jpeg(noise(*size), subsampling)
    whole = decode(data)
    for side in {16, 31, 48, 64, min(size) // 2, min(size)}:
        assert np.array_equal(decode_centre(data, side), centre_crop(whole, side)), side
    assert is_cut(data, 16)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_every_place_in_a_row_of_blocks_is_exact(subsampling):
    """The last row that is wanted may be any of the rows that are coded together."""
    for height in range(160, 194):
        data = jpeg(noise(height, 40, height), subsampling)
        assert np.array_equal(decode_centre(data, 32), centre_crop(decode(data), 32)), height


@pytest.mark.parametrize(
    "options",
    [
        {"restart_marker_rows": 1},
        {"restart_marker_blocks": 3},
        {"optimize": True},
        {"quality": 100, "subsampling": 0},
        {"exif": b"Exif\0\0" + b"\xff\xc0\0\x11\x08\0\x10\0\x10\x03\x01\x22\0" * 40},
        {"comment": b"\xff\xda\xff\xc2"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_markers_of_all_kinds_are_passed_over(options):
    data = by_pillow(noise(256, 256), **options)
    assert is_cut(data, 64)
    assert np.array_equal(decode_centre(data, 64), centre_crop(decode(data), 64))


@pytest.mark.parametrize(
    "data",
    [
        by_pillow(noise(128, 128), progressive=True),
        by_pillow(noise(128, 128), mode="CMYK"),
        by_pillow(noise(128, 128), "PNG"),
        by_pillow(noise(128, 128), "PNG", "P"),
        encode_fluxes(noise(128, 128).astype(np.float32)),
    ],
    ids=["progressive", "CMYK", "PNG", "palette", "fluxes"],
)
def test_files_that_are_not_coded_from_top_to_bottom_are_decoded_whole(data):
    assert not is_cut(data, 32)
    assert np.array_equal(decode_centre(data, 32), centre_crop(decode(data), 32))


def test_a_jpeg_of_several_scans_is_decoded_whole():
    data = jpeg(noise(128, 128), "444")
    scan = data.index(b"\xff\xda")
    alone = data[: scan + 4] + b"\x01" + data[scan + 5 :]  # as if a colour had a scan of its own
    assert centre._frame(data) is not None and centre._frame(alone) is None


def test_real_galaxies_have_the_same_centre(galaxies):
    if galaxies is None:
        pytest.skip("no real galaxies here")
    files = sorted((galaxies / "images").rglob("*.jpg"))[::29]
    looked_at = 0
    for file in files:
        data = file.read_bytes()
        try:
            whole = decode(data)
        except BadImageError:
            continue
        for side in (side for side in (32, 128) if side <= min(whole.shape[:2])):
            assert np.array_equal(decode_centre(data, side), centre_crop(whole, side)), file
            looked_at += 1
    assert looked_at > 20


def test_memory_that_is_given_is_used_where_it_suffices():
    data = jpeg(noise(256, 256))
    buffer = np.zeros(256 * 256 * 3, np.uint8)
    found = decode_centre(data, 64, buffer=buffer)
    assert np.shares_memory(found, buffer)
    small = decode_centre(data, 64, buffer=np.zeros(100, np.uint8))
    assert np.array_equal(found, small)


@pytest.mark.parametrize("strict", [False, True])
def test_images_that_are_smaller_are_refused(strict):
    data = jpeg(noise(100, 60))
    with pytest.raises(BadImageError, match="is 60 x 100 pixels, smaller than 64 x 64"):
        decode_centre(data, 32, 64, strict)
    with pytest.raises(BadImageError, match="smaller than 64 x 64"):
        decode_centre(data, 64, strict=strict)
    assert decode_centre(data, 32, 60, strict).shape == (32, 32, 3)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"galaxy", jpeg(noise(64, 64))[:90]]
)
def test_what_is_no_image_is_refused_as_by_the_whole_decode(data):
    with pytest.raises(BadImageError) as expected:
        decode(data)
    with pytest.raises(BadImageError) as found:
        decode_centre(data, 16)
    assert str(found.value) == str(expected.value)


def test_a_strict_decode_finds_every_truncation_where_the_other_reads_on_for_its_centre():
    data = jpeg(noise(256, 256))
    image = centre_crop(decode(data), 64)
    for length in range(400, len(data) - 2, 997):
        cut = data[:length]
        with pytest.raises(BadImageError):
            decode_centre(cut, 64, strict=True)
    # all but the last rows: nothing that is wanted is missing
    assert np.array_equal(decode_centre(data[: len(data) * 9 // 10], 64), image)


def test_a_strict_decode_never_differs_from_the_whole_one_for_flipped_bytes():
    data, rng = jpeg(noise(128, 128)), np.random.default_rng(0)
    outcomes = set()
    for place in rng.integers(2, len(data), 300):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.integers(8)
        try:
            expected = centre_crop(decode(bytes(flipped)), 32)
        except ValueError:
            with pytest.raises(BadImageError):
                decode_centre(bytes(flipped), 32, strict=True)
            outcomes.add("refused")
        else:
            assert np.array_equal(decode_centre(bytes(flipped), 32, strict=True), expected)
            outcomes.add("decoded")
    assert outcomes == {"refused", "decoded"}


def test_headers_that_lie_end_in_a_refusal_not_in_a_crash():
    data = jpeg(noise(128, 128))
    frame = centre._frame(data)
    for height, width in ((0, 128), (128, 0), (65535, 65535), (128, 127)):
        lying = data[: frame.place] + struct.pack(">HH", height, width) + data[frame.place + 4 :]
        with contextlib.suppress(BadImageError):
            assert decode_centre(lying, 32).shape == (32, 32, 3)
