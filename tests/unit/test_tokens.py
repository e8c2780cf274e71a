import io

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from astropt_ds.data.decode import decode
from astropt_ds.tokens import centre_crop, destandardise, grid, spiral, standardise
from tests.conftest import blob


def spiral_numbers(n):
    numbers = np.empty(n * n, dtype=int)
    numbers[spiral(n)] = np.arange(n * n)
    return numbers.reshape(n, n)


def test_the_spiral_is_that_of_the_released_weights():
    assert spiral_numbers(4).tolist() == [
        [15, 14, 13, 12],
        [4, 3, 2, 11],
        [5, 0, 1, 10],
        [6, 7, 8, 9],
    ]
    assert spiral_numbers(5).tolist() == [
        [24, 23, 22, 21, 20],
        [9, 8, 7, 6, 19],
        [10, 1, 0, 5, 18],
        [11, 2, 3, 4, 17],
        [12, 13, 14, 15, 16],
    ]
    first = [527, 528, 496, 495, 494, 526, 558, 559, 560, 561, 529, 497, 465, 464, 463, 462]
    assert spiral(32)[:16].tolist() == first
    assert spiral(32)[-4:].tolist() == [3, 2, 1, 0]


def test_the_first_64_of_1024_tokens_are_the_central_patches():
    rows, columns = np.divmod(spiral(32)[:64], 32)
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {
        (r, c) for r in range(12, 20) for c in range(12, 20)
    }


@given(st.integers(1, 40))
def test_the_spiral_walks_every_patch_once_in_unit_steps(n):
    order = spiral(n)
    assert sorted(order.tolist()) == list(range(n * n))
    rows, columns = np.divmod(order, n)
    assert (abs(np.diff(rows)) + abs(np.diff(columns)) == 1).all()


@given(st.integers(1, 12), st.integers(1, 4))
def test_a_smaller_stamp_is_a_prefix_of_a_larger_one(n, half_margin):
    m = n + 2 * half_margin
    rows, columns = np.divmod(spiral(m)[: n * n], m)
    assert ((rows - half_margin) * n + columns - half_margin == spiral(n)).all()


def check_definition(image, orientation):
    side = len(image)
    g = grid(side, 16, orientation)
    patches = g.to_patches(image)
    n = side // 16
    assert patches.shape == (n * n, 768) and patches.dtype == np.uint8
    for token, raster in enumerate(spiral(n)):
        row, column = divmod(int(raster), n)
        y, x = (row, column) if orientation == "rows" else (column, row)
        patch = image[16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
        if orientation == "columns":
            patch = patch.transpose(1, 0, 2)  # inside a patch (dx, dy, channel)
        assert (patches[token] == patch.reshape(-1)).all()  # channel fastest
    back = g.to_images(torch.from_numpy(patches)[None])
    assert (back[0].numpy() == image).all()
    return patches


@pytest.mark.parametrize("side", [16, 48, 64, 512])
@pytest.mark.parametrize("orientation", ["rows", "columns"])
def test_patches_follow_the_definition_and_can_be_put_back(side, orientation):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    check_definition(image, orientation)


@pytest.mark.parametrize("orientation", ["rows", "columns"])
def test_tokens_of_galaxies_follow_the_definition(galaxies, orientation):
    """Real images where they lie, blobs elsewhere: from the file's bytes to the model's input."""
    if galaxies:
        files = sorted((galaxies / "images" / "legacy_512").glob("*.jpg"))[:3]
        files += sorted((galaxies / "images" / "gz_examples").glob("*.jpg"))[:3]
        data = [file.read_bytes() for file in files]
    else:
        data = [simplejpeg.encode_jpeg(blob(i, 512), quality=90) for i in range(6)]
    assert len(data) == 6
    for encoded in data:
        image = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        assert (decode(encoded) == image).all()
        side = min(image.shape[:2]) // 16 * 16
        patches = check_definition(centre_crop(image, side), orientation)
        x = patches.astype(np.float64)
        spread = x.std(1, ddof=1, keepdims=True)
        expected = (x - x.mean(1, keepdims=True)) / (spread + 1e-8)
        tokens = standardise(torch.from_numpy(patches)).numpy()
        np.testing.assert_allclose(tokens, expected, atol=1e-5)


def test_a_grid_is_computed_once_and_refuses_what_is_no_grid():
    assert grid(64, 16, "rows") is grid(64, 16, "rows")
    with pytest.raises(ValueError, match="no whole number"):
        grid(60, 16, "rows")
    with pytest.raises(ValueError, match="'rows' or 'columns'"):
        grid(64, 16, "diagonal")


@pytest.mark.parametrize("height, width", [(424, 424), (417, 424), (512, 420)])
def test_the_centre_crop_keeps_the_centre(height, width):
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[height // 2, width // 2] = 255
    cropped = centre_crop(image, 416)
    assert cropped.shape == (416, 416, 3)
    y, x, _ = np.argwhere(cropped)[0]
    assert abs(y - 208) <= 1 and abs(x - 208) <= 1


def test_an_image_smaller_than_the_crop_is_refused():
    with pytest.raises(ValueError, match="320 x 300 pixels, smaller than 416 x 416"):
        centre_crop(np.zeros((300, 320, 3), np.uint8), 416)


def test_standardisation_follows_its_formula_in_fp32():
    patches = torch.randint(0, 256, (3, 5, 768), dtype=torch.uint8)
    x = patches.numpy().astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-8)
    tokens = standardise(patches)
    assert tokens.dtype == torch.float32
    np.testing.assert_allclose(tokens.numpy(), expected, atol=2e-6)
    restored = destandardise(tokens, patches)
    np.testing.assert_allclose(restored.numpy(), x, atol=1e-3)


def test_a_constant_patch_gives_zeros_whatever_its_value():
    integers = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 768)
    assert (standardise(integers) == 0).all()
    fractions = torch.rand(2000, 1).repeat(1, 768)  # whose means are rounded
    assert (standardise(fractions) == 0).all()
