import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from astropt_ds.config import BatchConfig
from astropt_ds.config_source import (
    load_config,
    load_model_config,
    parse_command_line,
    preset_names,
)
from astropt_ds.errors import UserError

TABLE_1 = {  # layers, heads, width, peak learning rate
    "1m": (4, 8, 128, 1e-3),
    "5m": (6, 8, 256, 1e-3),
    "12m": (6, 8, 384, 1e-3),
    "21m": (6, 8, 512, 1e-3),
    "89m": (12, 12, 768, 6e-4),
    "309m": (24, 16, 1024, 3e-4),
    "830m": (16, 8, 2048, 3e-4),
    "2100m": (26, 32, 2560, 1.6e-4),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_a_preset_is_the_papers_model_and_recipe(name):
    config = load_config(name)
    model = config.model
    shape = (model.layers, model.heads, model.width, config.optim.lr)
    assert shape == TABLE_1[name]
    assert (model.tokeniser, model.orientation, model.block_size) == ("relu", "rows", 1024)
    assert (config.data.image_size, config.tokens_per_image) == (512, 1024)
    assert (config.batch.global_images, config.run.steps) == (320, 30_000)
    schedule = config.schedule
    assert (schedule.warmup, schedule.decay_until, schedule.floor) == (2000, 29_700, 0.1)
    optim = config.optim
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip) == ((0.9, 0.95), 1e-8, 0.1, 1.0)
    assert (config.precision, config.data.augment, config.eval.every) == ("bf16", "none", 1000)
    assert config.zero.stage == (3 if name == "2100m" else 1)


def test_the_presets_are_the_ladder_and_the_demo():
    assert set(preset_names()) == {*TABLE_1, "demo"}
    assert load_config("demo").model.tokeniser == "aim"
    assert load_config("demo").model.orientation == "columns"


def test_a_printed_configuration_loads_as_itself(tmp_path, capsys):
    assert parse_command_line(["--config", "21m", "optim.lr=3e-4", "--print-config"]) is None
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == load_config("21m", ["optim.lr=0.0003"])


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {layers: 2, heads: 2, width: 8}\nrun: {steps: 7, dir: a}\n")
    config = load_config(path, ["run.steps=8", "run.steps=9", "run.dir=2024"])
    assert (config.run.steps, config.run.dir, config.model.layers) == (9, "2024", 2)


@pytest.mark.parametrize("name", ["2024_10_05", "2024-10-05", "007", "12:30", "off", "1e3"])
def test_a_value_is_what_its_key_says_not_what_yaml_guesses(name):
    overrides = [f"run.dir={name}", "wandb.mode=off", "zero.stage=3", "zero.offload=off"]
    config = load_config("1m", overrides)
    assert (config.run.dir, config.wandb.mode, config.zero.offload) == (name, "off", False)
    assert load_config("1m", ["batch.micro=null", "run.dir="]).batch.micro is None


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("modle.width=8", "unknown key 'modle'; did you mean 'model'?"),
        ("batch.globl_images=8", "did you mean 'batch.global_images'?"),
        ("optim.lr=fast", "optim.lr=fast should be a valid number"),
        ("optim.lr=yes", "optim.lr=yes should be a valid number"),
        ("optim.lr=nan", "optim.lr=nan should be a finite number"),
        ("optim.betas=[1.0,0.95]", "should be less than 1"),
        ("run.steps=0", "run.steps=0 should be greater than or equal to 1"),
        ("run.steps=2.5", "run.steps=2.5 should be a valid integer"),
        ("run.trace=[5,5]", "run: trace=[5,5] holds no step; [5,6] would"),
        ("run.trace=[0,2]", "run.trace.0=0 should be greater than or equal to 1"),
        ("run.trace=[29999,30002]", "after the last of steps=30000; [29999,30001] would be right"),
        ("run.trace=[30001,30002]", "trace=[30001,30002] begins after the last of steps=30000"),
        ("run.trace=10", "run.trace=10 should be "),
        ("batch.micro=yes", "batch.micro=yes should be a valid integer"),
        ("zero.stage=4", "zero.stage=4 should be less than or equal to 3"),
        ("zero.offload=true", "zero: offload=true needs stage=3, not stage=1"),
        ("precision=fp16", "precision=fp16 should be 'fp32' or 'bf16'"),
        ("zero.stage=0", "precision=bf16 at zero.stage=0"),
        ("data.image_size=8", "data.image_size=8 is smaller than a patch of 16 pixels"),
        ("data.image_size=500", "no multiple of the patch of 16 pixels; 496 or 512 would be"),
        ("data.image_size=528", "1089 tokens, more than model.block_size=1024; up to 512 pixels"),
        ("model.width=129", "width=129 is no multiple of heads=8"),
        ("model.attention=full", "would show each token its own target; causal would be right"),
        ("model.modalities.spectra.patch=1", "only 'images' is known"),
        ("schedule.warmup=30000", "warmup=30000 ends after decay_until=29700"),
        ("optim.lr.x=1", "'lr' is a value, not a section"),
        ("optim=3", "optim is a section; optim.KEY=value would be right"),
        ("steps", "key.sub=value would be right"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key_and_what_fits(override, message):
    with pytest.raises(UserError) as error:
        load_config("1m", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("3m", None, "no such preset; one of 1m 5m 12m 21m"),
        ("missing.yaml", None, "cannot be read"),
        ("broken.yaml", "a: [", "not YAML"),
        ("list.yaml", "- 1", "holds no mapping"),
        ("partial.yaml", "run: {steps: 3}", "model is missing"),
    ],
)
def test_a_bad_file_is_one_line_too(tmp_path, name, content, message):
    source = name
    if name.endswith(".yaml"):
        source = tmp_path / name
        if content is not None:
            source.write_text(content)
    with pytest.raises(UserError) as error:
        load_config(source)
    assert message in str(error.value) and "\n" not in str(error.value)


@given(st.integers(1, 400), st.integers(1, 64))
def test_micro_batch_times_accumulation_times_ranks_is_the_global_batch(images, ranks):
    batch = BatchConfig(global_images=images)
    if images % ranks:
        with pytest.raises(UserError, match="is no multiple of") as error:
            batch.split(ranks)
        for fit in str(error.value).partition("; ")[2].removesuffix(" would be").split(" or "):
            BatchConfig(global_images=int(fit)).split(ranks)
    else:
        micro, accumulation = batch.split(ranks)
        assert micro * accumulation * ranks == images
        assert micro <= 16


def test_a_micro_batch_that_does_not_divide_is_refused_with_those_that_do():
    assert BatchConfig(global_images=24, micro=3).split(2) == (3, 4)
    with pytest.raises(
        UserError, match=r"batch.micro=5 does not divide .* 1, 2, 3, 4, 6, 12 would"
    ):
        BatchConfig(global_images=24, micro=5).split(2)


def test_the_command_line_exits_with_2_and_one_line():
    command = [sys.executable, "-m", "astropt_ds.train", "--config", "1m", "optim.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: configuration 1m: unknown key 'optim.lrr'; did you mean 'optim.lr'?"
    ]


def test_print_config_is_yaml_on_standard_output(capsys):
    parse_command_line(["--config", "demo", "--print-config", "--local_rank=0"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["tokeniser"] == "aim"


def test_the_model_alone_need_not_fit_the_rest_of_a_run(tmp_path):
    overrides = ["model.block_size=256", "model.tokeniser=aim"]
    with pytest.raises(UserError, match="data.image_size=512 makes 1024 tokens"):
        load_config("1m", overrides)
    model = load_model_config("1m", overrides)
    assert (model.block_size, model.width, model.orientation) == (256, 128, "columns")
    (tmp_path / "model.yaml").write_text("model: {layers: 2, heads: 3, width: 32}")
    with pytest.raises(UserError, match=r"model.yaml: model: width=32 is no multiple of heads=3"):
        load_model_config(tmp_path / "model.yaml")
    with pytest.raises(UserError, match="unknown key 'model.wdith'; did you mean 'model.width'"):
        load_model_config("1m", ["model.wdith=3"])


def test_auto_is_kept_as_it_was_given_until_the_devices_are_known():
    config = load_config("2100m", ["zero.stage=auto", "batch.micro=auto"])
    assert (config.zero.stage, config.batch.micro) == (None, None)
    assert config.model_dump(mode="json")["zero"]["stage"] == "auto"
    assert yaml.safe_load(config.to_yaml())["batch"]["micro"] == "auto"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("zero.stage=1", "zero.hpz=true"), "hpz=true needs stage=3, not stage=1"),
        (("zero.stage=auto", "zero.hpz=true"), "hpz=true needs stage=3, not stage=auto"),
        (("zero.stage=3", "zero.hpz=true", "zero.offload=true"), "exclude each other"),
        (("zero.stage=5",), "zero.stage"),
        (("batch.micro=some",), "batch.micro"),
    ],
)
def test_partitions_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("1m", list(overrides))
