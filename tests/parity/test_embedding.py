"""Embeddings of real galaxies against AstroPT's own: 2.0.9's code, its renames, v1's formulas."""

import numpy as np
import pytest
import simplejpeg
import torch

from astropt_ds import Embedder, read_embeddings
from astropt_ds.benchmark.reference import reference_dataset
from astropt_ds.convert.find import open_source
from astropt_ds.convert.write import write_astropt
from astropt_ds.embedding.job import EmbedJob
from astropt_ds.embedding.run import embed
from tests.conftest import blob
from tests.parity.test_conversion import built, saved, upstream  # noqa: F401
from tests.unit.convert import documented

pytestmark = pytest.mark.needs("parity")

SIDE, COUNT = 256, 12


@pytest.fixture(scope="module")
def stamps(galaxies, tmp_path_factory):
    """Folders of JPEG stamps of SIDE and of 2 SIDE pixels, real ones where they lie."""
    root = tmp_path_factory.mktemp("stamps")
    found = {}
    for side in (SIDE, 2 * SIDE):
        folder = root / str(side)
        folder.mkdir()
        for i in range(COUNT):
            image = blob(i, side)
            if galaxies:
                path = sorted((galaxies / "images/legacy_512").glob("*_centre.jpg"))[i]
                whole = simplejpeg.decode_jpeg(path.read_bytes())
                margin = (len(whole) - side) // 2
                image = np.ascontiguousarray(whole[margin:, margin:][:side, :side])
            (folder / f"{i:02d}.jpg").write_bytes(simplejpeg.encode_jpeg(image, quality=92))
        found[side] = folder
    return found


def theirs(folder, tmp_path, generation):
    """(images, tokens, values) by upstream's own reader of files, standardised in fp32."""
    files = sorted(folder.glob("*.jpg"))
    dataset = reference_dataset(files, tmp_path)
    dataset.transform = {"images": standardised}
    axes = (2, 0, 1) if generation == "v1" else (2, 1, 0)
    pixels = [simplejpeg.decode_jpeg(file.read_bytes()) for file in files]
    images = [torch.from_numpy(image).permute(axes).float() for image in pixels]
    return torch.stack([dataset.process_galaxy(image) for image in images])


def standardised(x):
    std, mean = torch.std_mean(x, dim=1, keepdim=True)
    return (x - mean) / (std + 1e-8)


def ours(model, folder, output, **options):
    embed(EmbedJob(str(model), (str(folder),), output, **options), say=lambda line: None)
    table = read_embeddings(output, kind="numpy")
    return table["embedding"][np.argsort(table["id"])]


@pytest.mark.parametrize("tokeniser", ["aim", "affine"])
@pytest.mark.parametrize("side", [SIDE, 2 * SIDE])
def test_v2_and_v3_embed_as_astropt_does(upstream, stamps, tmp_path, side, tokeniser):  # noqa: F811
    reference, args = built(upstream, "1m", tokeniser)
    path = saved(tmp_path / "v2.pt", reference, args)
    tokens = theirs(stamps[side], tmp_path, "v2")
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    with torch.no_grad():
        inputs = {"images": tokens, "images_positions": positions}
        expected = reference.generate_embeddings(inputs)["images"].numpy()
        decayed = reference.generate_embeddings(inputs, "exp_decay")["images"].numpy()
        last = reference.generate_embeddings(inputs, "last")["images"].numpy()
    # an affine tokeniser passes large values on, of which 1e-5 is less than the last bits
    rtol = 1e-5 if tokeniser == "affine" else 0
    found = ours(path, stamps[side], tmp_path / "table")
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=rtol)
    assert expected.std(axis=0).max() > 1e-2  # galaxies differ
    write_astropt(open_source(path), tmp_path / "v3.pt", "v3")
    renamed = ours(tmp_path / "v3.pt", stamps[side], tmp_path / "renamed")
    assert np.array_equal(renamed, found)
    for pooling, value in (("exp_decay", decayed), ("last", last)):
        pooled = ours(path, stamps[side], tmp_path / pooling, pooling=pooling)
        np.testing.assert_allclose(pooled, value, atol=1e-5, rtol=rtol)


def test_v1_embeds_as_its_formulas_do(upstream, stamps, tmp_path):  # noqa: F811
    state = {k: v / 2 for k, v in documented.random_state("v1", 3, 64).items()}
    path = documented.save(tmp_path / "v1.pt", state, documented.model_args("v1", 3, 4, 64))
    tokens = theirs(stamps[2 * SIDE], tmp_path, "v1")
    expected = documented.v1_states(state, tokens, 3, 4)[:, :64].mean(dim=1).numpy()
    found = ours(path, stamps[2 * SIDE], tmp_path / "table")
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert expected.std(axis=0).max() > 1e-2


def test_a_notebooks_arrays_give_the_tables_embeddings(upstream, stamps, tmp_path):  # noqa: F811
    path = saved(tmp_path / "v2.pt", *built(upstream, "1m"))
    files = sorted(stamps[SIDE].glob("*.jpg"))
    images = np.stack([simplejpeg.decode_jpeg(file.read_bytes()) for file in files])
    found = ours(path, stamps[SIDE], tmp_path / "table")
    np.testing.assert_allclose(Embedder(path).embed(images), found, atol=1e-5, rtol=0)
