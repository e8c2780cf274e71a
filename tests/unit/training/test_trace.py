import gzip
import json

import pytest
import torch

from astropt_ds.training.ranks import ALONE
from astropt_ds.training.trace import Trace


def traced(trace, steps):
    """What the trace says of steps that each compute something of their own."""
    works = (torch.sin, torch.cos, torch.tan, torch.exp)
    trace.turn(steps.start - 1)
    for step in steps:
        works[step - 1](torch.ones(3))
        trace.turn(step)
    trace.close()
    (file,) = trace.folder.iterdir()
    with gzip.open(file) as text:
        names = {event.get("name") for event in json.load(text)["traceEvents"]}
    return file.name, {name for name in names if name in ("aten::sin", "aten::cos", "aten::tan")}


@pytest.mark.parametrize(
    "steps, first, names",
    [
        (range(1, 5), 2, {"aten::cos", "aten::tan"}),
        (range(3, 5), 3, {"aten::tan"}),  # resumed after the first of them
        (range(1, 3), 2, {"aten::cos"}),  # stopped before the last of them
    ],
)
def test_a_trace_is_of_the_steps_that_are_named_as_far_as_they_are_made(
    tmp_path, steps, first, names
):
    expected = f"step-{first:08d}-rank-00000.json.gz", names
    assert traced(Trace((2, 4), tmp_path / "trace", ALONE), steps) == expected


def test_nothing_is_traced_unasked(tmp_path):
    trace = Trace(None, tmp_path / "trace", ALONE)
    assert not any(trace.turn(step) for step in range(3))
    trace.close()
    assert not trace.folder.exists()


def test_a_trace_that_cannot_be_written_is_warned_of_in_one_line(tmp_path, capsys):
    folder = tmp_path / "trace"
    folder.write_text("")
    trace = Trace((1, 2), folder, ALONE)
    assert trace.turn(0) and trace.turn(1)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]
    assert line.startswith(f"warning: {folder}/step-00000001-rank-00000.json.gz could not be writ")
