import re

import pytest
import torch

from astropt_ds.errors import UserError
from astropt_ds.model_folder.card import model_card
from astropt_ds.model_folder.release import Release
from tests.unit.model_folder.folders import small, write

FACTS = {
    "step": 1200,
    "tokens": 4_915_200,
    "flops": 3_500_000_000_000_000,
    "loss": 0.41,
    "val_loss": 0.3886,
    "image_size": 96,
    "data": "d" * 64,
    "source": {"format": "astropt-v1", "sha256": "e" * 64},
}


@pytest.fixture(scope="module")
def model():
    return small("relu").config


def card(model, facts, **release):
    return model_card(model, torch.bfloat16, facts, Release(**release))


@pytest.fixture
def parsed(hub_cache):
    """The front matter of a card, as the hub's own library reads it."""
    from huggingface_hub import ModelCard

    return lambda text: ModelCard(text).data


@pytest.mark.needs("hub")
def test_the_hub_reads_licence_data_sets_and_metric(parsed, model):
    text = card(model, FACTS, license="cc-by-4.0", datasets=("Smith42/galaxies",))
    data = parsed(text)
    assert (data.license, data.datasets) == ("cc-by-4.0", ["Smith42/galaxies"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert {"astronomy", "galaxies", "astropt"} <= set(data.tags)
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value) == ("huber_loss", 0.3886)
    assert (result.task_type, result.dataset_type) == (data.pipeline_tag, "Smith42/galaxies")


@pytest.mark.needs("hub")
@pytest.mark.parametrize(
    "facts, value",
    [
        ({"best_val_loss": 0.5}, 0.5),
        ({"best_val_loss": 0.5, "val_loss": 0.4}, 0.4),
        ({"val_loss": 1e-5}, 1e-5),
        ({"val_loss": None}, None),
        ({}, None),
    ],
)
def test_the_metric_is_a_validation_loss_where_one_is_known(parsed, model, facts, value):
    data = parsed(card(model, facts))
    found = [result.metric_value for result in data.eval_results or []]
    assert found == ([] if value is None else [value])
    assert (data.license, data.datasets) == ("unknown", None)


@pytest.mark.needs("hub")
@pytest.mark.parametrize("package", ["transformers", "astropt_ds"])
def test_what_the_card_says_of_use_runs(transformers, tmp_path, package):
    model = small("aim", "model.block_size=36")
    folder = write(tmp_path / "model", model)  # whose image size is not known
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    [code] = [snippet for snippet in snippets if f"{package}" in snippet]
    assert code.count('"ORGANISATION/NAME"') == 1
    run = {}
    exec(code.replace('"ORGANISATION/NAME"', repr(str(folder))), run)
    with torch.no_grad():
        tokens = model.tokens(run["images"])
        assert torch.equal(run["predictions"], model(tokens)[0])
        assert torch.equal(run["embeddings"], model.hidden_states(tokens, "middle").mean(dim=1))
    assert run["embeddings"].shape == (1, 32)


def test_the_card_tells_architecture_preprocessing_and_training(model):
    text = card(model, FACTS)
    for line in (
        "# AstroPT 0.125M",
        "| layers, heads, width | 3, 4, 32 |",
        "| generation | v1 (tokeniser `relu`) |",
        "| orientation | `rows` |",
        "| weights | bfloat16 |",
        "| epsilon | 1e-08 |",
        "| image_size | 96 |",
        "| tokens | 4,915,200 |",
        "| FLOPs | 3.5e+15 |",
        f"| made from | format astropt-v1, sha256 {'e' * 64} |",
        f"| hash of the data | {'d' * 64} |",
    ):
        assert f"\n{line}\n" in text
    assert "arXiv:2405.14930" in text


def test_a_model_of_which_nothing_is_known_has_no_empty_rows(model):
    text = card(model, {"val_loss": None})
    assert "Nothing is known of it." in text
    assert "None" not in text


def test_the_same_model_gives_the_same_folder_anywhere(tmp_path):
    release = Release("mit", ("a/b",))
    folders = [
        write(tmp_path / f"{name}/model", small("aim"), FACTS, release=release) for name in "ab"
    ]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert len(files[0]) == 4


@pytest.mark.parametrize(
    "release, message",
    [
        ({"license": "CC BY 4.0"}, "license=CC BY 4.0: not an identifier"),
        ({"license": ""}, "license=: not an identifier"),
        ({"license": "mit\nevil: 1"}, "not an identifier"),
        ({"datasets": ("a/b", "a/b/c")}, "datasets=a/b/c: not an id"),
        ({"datasets": ("my galaxies",)}, "datasets=my galaxies: not an id"),
    ],
)
def test_what_the_hub_would_not_take_is_refused(release, message):
    with pytest.raises(UserError, match=message):
        Release(**release)
