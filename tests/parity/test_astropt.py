"""Against AstroPT's own implementation, PyPI's astropt 2.0.9, with the same weights."""

import pytest
import torch

from astropt_ds.config_source import load_config
from astropt_ds.model import AstroPT

pytestmark = pytest.mark.needs("parity")

# AstroPT v2 to v3, whose names are ours
RENAMES = {
    "encoders.images.": "transformer.wte.images.",
    "embedders.images.": "transformer.wpe.images.",
    "decoders.images.": "lm_head.images.",
}


@pytest.fixture(scope="module")
def upstream():
    return pytest.importorskip("astropt.model", reason="astropt 2.0.9 is not installed")


def pair(upstream, preset, tokeniser):
    config = load_config(preset, [f"model.tokeniser={tokeniser}"]).model
    images = upstream.ModalityConfig(
        name="images", input_size=768, pos_input_size=1, patch_size=16, embed_pos=True
    )
    reference = upstream.GPT(
        upstream.GPTConfig(
            block_size=1024,
            n_layer=config.layers,
            n_head=config.heads,
            n_embd=config.width,
            n_chan=3,
            tokeniser=tokeniser,
            modalities=[images],
        ),
        upstream.ModalityRegistry([images]),
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for p in reference.parameters():  # leave the symmetric start: norms and all matter
        p.data.add_(torch.randn(p.shape, generator=generator) * 0.005)
    theirs = reference.state_dict()
    ours = AstroPT(config)
    state = {}
    for name in ours.state_dict():
        prefix = next((new for new in RENAMES if name.startswith(new)), None)
        state[name] = theirs[name.replace(prefix, RENAMES[prefix]) if prefix else name]
    assert len(state) == len(theirs)
    ours.load_state_dict(state, strict=True)
    return reference, ours


@pytest.mark.parametrize("tokens", [256, 1024])
@pytest.mark.parametrize("tokeniser", ["aim", "affine"])
@pytest.mark.parametrize("preset", ["1m", "21m"])
def test_predictions_and_loss_are_upstreams(upstream, preset, tokeniser, tokens):
    reference, ours = pair(upstream, preset, tokeniser)
    x = torch.randn(2, tokens, 768, generator=torch.Generator().manual_seed(1))
    inputs, targets = x[:, :-1], x[:, 1:]
    positions = torch.arange(tokens - 1).expand(2, -1)
    with torch.no_grad():
        expected, expected_loss = reference(
            {"images": inputs, "images_positions": positions}, targets={"images": targets}
        )
        predictions, loss = ours(inputs, targets)
    # one affine layer passes large values on, of which 1e-6 is less than the last bit
    rtol = 1e-6 if tokeniser == "affine" else 0
    torch.testing.assert_close(predictions, expected["images"], atol=1e-6, rtol=rtol)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-6)
    assert expected["images"].std() > 0.01  # not a comparison of zeros
