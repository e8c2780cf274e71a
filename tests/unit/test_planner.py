import json

import pytest

from astropt_ds.errors import UserError
from tools import plan

BASE = ("--config", "2100m", "--gpus", "32", "--gpu", "h100")


def printed(capsys, *arguments):
    plan.main([*arguments])
    return capsys.readouterr().out


def test_the_text_shows_the_numbers_of_the_json(capsys):
    found = json.loads(printed(capsys, *BASE, "--price", "2.5", "--json"))
    text = printed(capsys, *BASE, "--price", "2.5")
    for name, way in found["ways"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"  ZeRO-{name} "))
        words = line[17:].split()
        assert words[-7] == f"{way['memory']['state'] / 1e9:.2f}"
        assert words[-5:-1] == [
            f"{way['peak'] / 1e9:.2f}",
            *("yes" if way["fits"] else "no", str(way["micro"]), str(way["accumulation"])),
        ]
    proposal = found["proposal"]
    assert f"batch.micro={proposal['batch.micro']}, accumulation" in text
    assert f"{found['run']['gpu_hours']:,.4g} GPU hours" in text
    assert f"{found['sweep']['all']['kwh']:,.4g} kWh" in text
    total = sum(run["cost"] for name, run in found["sweep"].items() if name != "all")
    assert found["sweep"]["all"]["cost"] == pytest.approx(total)


def test_where_nothing_fits_the_plan_says_so_and_goes_on(capsys):
    text = printed(capsys, "--config", "2100m", "--gpus", "1", "--gpu", "l4", "batch.micro=auto")
    assert "proposal: none, 1 GPUs of 23.6 GB are too few" in text and "the run:" in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((*BASE[:4], "--gpu", "gtx"), "--gpu gtx: one of"),
        ((*BASE[:2], "--gpus", "12", "--gpu", "h100"), "no multiple of a node's 8"),
        ((*BASE[:2], "--gpus", "7", "--gpu", "h100"), "no multiple of 7 ranks; 315 or 322"),
        ((*BASE[:2], "--gpus", "0", "--gpu", "h100"), "--gpus 0: 1 or more"),
        ((*BASE, "--utilisation", "1.5"), "--utilisation 1.5: above 0, at most 1"),
        ((*BASE, "zero.stag=1"), "did you mean 'zero.stage'"),
    ],
)
def test_bad_input_ends_in_a_line_that_says_what_would_be_right(arguments, words):
    with pytest.raises(UserError, match=words):
        plan.main([*arguments])
