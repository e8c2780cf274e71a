import json

import pytest

from astropt_ds.accounting import account, account_embedding
from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.flops import training_flops
from tools.flops import main


def test_a_run_is_its_steps_and_a_step_its_images():
    config = load_config("1m", ["batch.global_images=7", "run.steps=3", "data.image_size=96"])
    found = account(config)
    assert found["tokens"] == 36
    image = found["training"]["image"]
    assert image["exact"] == training_flops(config.model, 36)
    assert found["training"]["run"] == {name: 21 * count for name, count in image.items()}
    assert found["training"]["step"] == {name: 7 * count for name, count in image.items()}
    parts = found["parts"]
    both = sum(parts["forward"].values()) + sum(parts["backward"].values())
    assert image["exact"] == image["hardware"] == both
    assert image["causal"] < image["exact"]


def test_an_embedding_counts_only_the_blocks_and_tokens_that_it_needs():
    config = load_config("21m")
    whole = account_embedding(config, "last", None)
    some = account_embedding(config, "middle", 64)
    assert (whole["blocks"], some["blocks"], some["tokens"]) == (6, 4, 64)
    assert some["causal"] < some["exact"] < whole["causal"] / 16
    assert whole["parts"]["head"] == 0
    with pytest.raises(UserError, match="--tokens 1025: 1 to 1024"):
        account_embedding(config, "last", 1025)
    with pytest.raises(UserError, match="layer 6"):
        account_embedding(config, 6, None)


def test_the_tool_prints_what_it_counts(capsys):
    main(["--config", "21m", "--tokens", "64", "--layer", "-1", "recompute=full", "--json"])
    found = json.loads(capsys.readouterr().out)
    config = load_config("21m", ["recompute=full"])
    assert found["training"] == account(config)["training"]
    assert found["embedding"]["blocks"] == 6
    main(["--config", "21m", "recompute=full"])
    text = capsys.readouterr().out
    assert "21,505,792 parameters" in text
    assert f"{found['training']['run']['hardware']:.4g}" in text
    main([])
    assert len(capsys.readouterr().out.splitlines()) == 10  # every preset, below a heading
