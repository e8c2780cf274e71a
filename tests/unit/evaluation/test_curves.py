import json
import sys

import numpy as np
import pytest
from PIL import Image

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.evaluation.curves import draw, plot_runs, read_runs
from astropt_ds.training.metrics import METRICS, Metrics, read_metrics

CONFIG = load_config("1m")
SKIPPED = {5: None, 12: 900.0}  # the losses at which updates were skipped
STEPS = 16
VALIDATED = range(0, STEPS + 1, 8)


def write_run(folder, steps=range(STEPS + 1), level=0.5, skipped=SKIPPED, validated=VALIDATED):
    """Records as a training leaves them; further steps are those of another attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(folder, steps[0] - 1, CONFIG)
    for step in steps:
        counters = {"samples": step * 8, "tokens": step * 512, "flops": step * 10**20}
        if step:
            metrics.write(
                "train",
                step,
                updates=step,
                **counters,
                loss=skipped.get(step, level + 0.1 / step),
                lr=1e-3 * (step - 1),
                grad_norm=skipped.get(step, 2.0 / step),
                skipped=int(step in skipped),
                tokens_per_s=1000.0 + step,
                mfu=None,
            )
        if step in validated:
            baselines = {"loss_zeros": 0.8 - step / 100, "loss_previous": 1.5}
            metrics.write("val", step, **counters, loss=level, n=9, **baselines)
    metrics.write("event", step, event="finish", text="complete")
    metrics.close()
    return folder


def panels(figure):
    """The six panels by what they show: (against, what)."""
    return {(axis.get_xlabel(), axis.get_ylabel()): axis for axis in figure.axes}


def drawn(axis, label):
    """The one line or set of marks of that name, as (x, y)."""
    (line,) = [line for line in axis.lines if line.get_label() == label]
    return [np.asarray(values, dtype=float) for values in line.get_data()]


def recorded(folder, kind, key):
    return np.array([r[key] for r in read_metrics(folder) if r["kind"] == kind], dtype=float)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def figure(run):
    return draw(read_runs([run]))


@pytest.mark.parametrize(
    "label, key", [("steps", "step"), ("tokens", "tokens"), ("training FLOPs", "flops")]
)
def test_losses_are_those_of_the_records(run, figure, label, key):
    axis = panels(figure)[label, "Huber loss"]
    x, y = drawn(axis, "training, each step")
    np.testing.assert_array_equal(x, recorded(run, "train", key))
    np.testing.assert_array_equal(y, recorded(run, "train", "loss"))
    x, y = drawn(axis, "validation")
    np.testing.assert_array_equal(x, recorded(run, "val", key))
    np.testing.assert_array_equal(y, recorded(run, "val", "loss"))


@pytest.mark.parametrize(
    "label, key",
    [
        ("throughput, tokens/s", "tokens_per_s"),
        ("learning rate", "lr"),
        ("gradient norm", "grad_norm"),
    ],
)
def test_throughput_learning_rate_and_gradient_norm_are_those_of_the_records(
    run, figure, label, key
):
    x, y = (np.asarray(v, dtype=float) for v in panels(figure)["steps", label].lines[0].get_data())
    np.testing.assert_array_equal(x, recorded(run, "train", "step"))
    np.testing.assert_array_equal(y, recorded(run, "train", key))


def test_flops_and_gradient_norms_are_on_logarithmic_axes(figure):
    assert panels(figure)["training FLOPs", "Huber loss"].get_xscale() == "log"
    assert panels(figure)["steps", "gradient norm"].get_yscale() == "log"


def test_the_baseline_is_the_better_one_of_the_last_validation(figure):
    for counter in ("steps", "tokens", "training FLOPs"):
        axis = panels(figure)[counter, "Huber loss"]
        _, y = drawn(axis, "better baseline (zeros or previous patch)")
        assert set(y) == {0.8 - STEPS / 100}


def test_a_running_mean_is_over_the_root_of_the_steps_and_leaves_out_skipped_updates(tmp_path):
    folder = write_run(tmp_path / "run", steps=range(10), skipped={5: 900.0})
    axis = panels(draw(read_runs([folder])))["steps", "Huber loss"]
    x, y = drawn(axis, "training, running mean")
    losses = recorded(folder, "train", "loss")
    np.testing.assert_array_equal(x, np.arange(1, 10))
    assert y[1] == pytest.approx(losses[0:3].mean())
    assert y[4] == pytest.approx((losses[3] + losses[5]) / 2)


def test_skipped_updates_are_marked_where_they_were(figure, tmp_path):
    x, _ = drawn(panels(figure)["steps", "gradient norm"], "skipped update")
    assert list(x) == list(SKIPPED)
    unharmed = draw(read_runs([write_run(tmp_path / "run", skipped={})]))
    labels = [line.get_label() for line in panels(unharmed)["steps", "gradient norm"].lines]
    assert "skipped update" not in labels


def test_a_spike_does_not_flatten_the_losses(tmp_path):
    folder = write_run(tmp_path / "run", steps=range(200), skipped={90: 900.0})
    low, high = panels(draw(read_runs([folder])))["steps", "Huber loss"].get_ylim()
    losses = np.delete(recorded(folder, "train", "loss"), 89)
    assert low < losses.min() and losses.max() < high < 1


@pytest.mark.parametrize("count", [2, 12])
def test_every_run_has_its_colour_and_its_name_in_the_legend(tmp_path, count):
    names = [f"run-{n}" for n in range(count)]
    figure = draw(read_runs([write_run(tmp_path / name, level=0.5) for name in names]))
    legend = figure.legends[0]
    colours = [line.get_color() for line in legend.get_lines()]
    assert [text.get_text() for text in legend.get_texts()] == names
    assert len(set(colours)) == count
    for axis in figure.axes:
        assert {line.get_color() for line in axis.lines} == set(colours)


def test_runs_of_the_same_name_are_called_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / parent / "run") for parent in "ab"]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_a_run_of_several_attempts_is_one_course(tmp_path):
    folder = write_run(tmp_path / "run", steps=range(12))
    write_run(folder, steps=range(9, STEPS + 1), level=0.4)
    (run,) = read_runs([folder])
    assert list(run.train.step) == list(range(1, STEPS + 1))
    _, y = drawn(panels(draw([run]))["steps", "Huber loss"], "training, each step")
    assert y[7] == 0.5 + 0.1 / 8 and y[8] == 0.4 + 0.1 / 9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "course",
    [
        {"steps": range(2), "validated": ()},
        {"steps": range(4), "validated": (), "skipped": {1: None, 2: None, 3: None}},
    ],
    ids=["one step", "all skipped"],
)
def test_a_run_that_has_hardly_begun_is_drawn_too(tmp_path, course):
    folder = write_run(tmp_path / "run", **course)
    path, _ = plot_runs([folder], None)
    with Image.open(path) as image:
        assert image.format == "PNG"


def test_the_command_writes_the_figure_and_says_what_is_in_it(run, tmp_path, launch):
    second = write_run(tmp_path / "second", skipped={})
    output = tmp_path / "both.png"
    result = launch(1, "tools/plot_run.py", run, second, "--output", output, launcher="python")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"{output}: first: 16 steps, 3 validations, 2 skipped updates; "
        "second: 16 steps, 3 validations, 0 skipped updates\n"
    )
    with Image.open(output) as image:
        assert image.size == (1920, 1080)
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 100


def test_the_command_ends_with_one_line_and_2_where_there_is_no_run(tmp_path, launch):
    result = launch(1, "tools/plot_run.py", tmp_path, launcher="python")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {tmp_path}: holds no {METRICS}")
    assert result.stderr.count("\n") == 1


def without(key):
    def damage(lines):
        record = json.loads(lines[3])
        del record[key]
        return [*lines[:3], json.dumps(record), *lines[4:]]

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: [lines[0], '{"kind": "tra', *lines[1:]], "line 2"),
        (lambda lines: [*lines, "17"], f"line {STEPS + len(VALIDATED) + 2}"),
        (lambda lines: lines[:1], "holds no training step"),
        (without("tokens_per_s"), "the train record of step 3 has no number as tokens_per_s"),
        (lambda lines: [lines[0].replace("0.5", '"low"'), *lines[1:]], "no number as loss"),
    ],
)
def test_damaged_records_are_one_line_that_names_the_file(tmp_path, damage, message):
    path = write_run(tmp_path / "run") / METRICS
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in damage(lines)))
    with pytest.raises(UserError) as error:
        plot_runs([path.parent], None)
    assert str(path) in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (path.parent / "curves.png").exists()


def test_an_output_that_does_not_fit_is_one_line(run, tmp_path):
    second = write_run(tmp_path / "second")
    for folders, output, message in [
        ([run, second], None, "--output is missing: several runs need it"),
        ([run], tmp_path / "run.pdf", "a name that ends in .png would be right"),
        ([run], tmp_path / "missing" / "run.png", "cannot be written (No such file"),
        ([run, run], tmp_path / "run.png", "is given twice"),
    ]:
        with pytest.raises(UserError) as error:
            plot_runs(folders, output)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_without_matplotlib_the_line_says_how_to_get_it(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'astropt-ds\[plots\]'"):
        plot_runs([run], tmp_path / "run.png")
