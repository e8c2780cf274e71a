"""tools/preflight.py on two ranks of which one is at fault: its node is named, in one line."""

import pytest

SCRIPT = "tests/distributed/disturbed_preflight.py"


@pytest.mark.parametrize(
    "fault, line",
    [
        ("hang", "no answer in 5 s from node1; leave out: --exclude=node1"),
        ("device", "node1: 1 x cpu, {free} GB free: UNFIT: GPU 0: cannot compute: CUDA error: unc"),
        ("data", "UNFIT: data: not-mounted-here: "),
    ],
)
def test_the_node_at_fault_is_named(launch, shards, tmp_path, fault, line):
    options = ("--timeout", "5", "--config", "1m", f"data.path={shards}")
    done = launch(2, SCRIPT, fault, *options, f"run.dir={tmp_path / 'run'}")
    said = done.stdout + done.stderr.split("\nE", 1)[0]
    assert done.returncode and "--exclude=node1" in said, done.stderr
    assert line.split("{free}")[-1] in said and "Traceback" not in said
    if fault != "hang":
        assert "node0: 1 x cpu, product" in said
