"""What an embedding is: the generation's own definition, or another one."""

import pytest
import torch

from astropt_ds.config_source import load_config
from astropt_ds.embedding.recipe import POOLINGS, make_recipe
from astropt_ds.errors import UserError


def model(**keys):
    return load_config("1m", [f"model.{key}={value}" for key, value in keys.items()]).model


def test_each_generation_has_astropts_own_embedding():
    v1 = make_recipe(model(tokeniser="relu"), 1024)
    assert (v1.layers, v1.pooling, v1.tokens) == ((3,), "mean", 64)
    for tokeniser in ("aim", "affine"):
        later = make_recipe(model(tokeniser=tokeniser), 256)
        assert (later.layers, later.pooling, later.tokens) == ((2,), "mean", 256)
    assert make_recipe(model(tokeniser="relu"), 36).tokens == 36  # there are no more


def test_several_layers_are_several_columns_in_rising_order():
    recipe = make_recipe(model(), 16, ("last", 0, "middle", 2), "none", 5)
    assert recipe.columns == {f"embedding_{n}": (5, 128) for n in (0, 2, 3)}
    assert make_recipe(model(), 16, (-1,)).columns == {"embedding": (128,)}


def test_causal_models_read_only_the_tokens_that_are_pooled_others_read_all():
    assert make_recipe(model(), 100, tokens=7).reads == 7
    full = model().model_copy(update={"attention": "full"})
    assert make_recipe(full, 100, tokens=7).reads == 100


def test_poolings_are_what_their_names_say():
    states = torch.randn(3, 10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pool = {name: function(states.float()).double() for name, function in POOLINGS.items()}
    weights = torch.tensor([10 ** (-t / 9) for t in range(10)], dtype=torch.float64)
    expected = {
        "mean": states.sum(1) / 10,
        "last": states[:, 9],
        "exp_decay": (states * weights[:, None]).sum(1) / weights.sum(),
        "max": states.max(dim=1).values,
        "none": states,
    }
    assert pool.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(pool[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": (4,)}, "layer 4: 'last', 'middle' or a number from -4 to 3"),
        ({"layers": ("first",)}, "layer 'first'"),
        ({"pooling": "median"}, "--pool median: one of mean, last, exp_decay, max, none"),
        ({"tokens": 65}, "--tokens 65: 1 to 64, or all"),
        ({"tokens": 0}, "--tokens 0: 1 to 64"),
        ({"tokens": "some"}, "--tokens some: 1 to 64"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(options, words):
    with pytest.raises(UserError, match=words):
        make_recipe(model(), 64, **options)
