"""sbatch slurm/preflight.sh on a real Slurm: a line a node, and which are unfit."""

import re

import pytest

pytestmark = pytest.mark.needs("slurm")


def test_fit_nodes_and_their_links_are_told_in_a_line_each(cluster, submit, tmp_path):
    job = submit("preflight.sh", tmp_path / "fit")
    assert cluster.wait_for_end(job) == "COMPLETED", (tmp_path / "fit.log").read_text()
    log = (tmp_path / "fit.log").read_text()
    for node in ("astro1", "astro2"):
        (line,) = re.findall(rf"^{node}: .*$", log, re.MULTILINE)
        assert re.fullmatch(rf"{node}: 1 x cpu, product \S+ ms, [\d,]+ GB free: fit", line)
    assert re.search(r"^all-reduce over 2 ranks, 16 MiB: \d+\.\d+ GB/s .*: fit$", log, re.M)


def test_nodes_without_room_for_checkpoints_and_slow_links_fail_the_job(cluster, submit, tmp_path):
    huge = "checkpoint.keep=1000000000"
    job = submit("preflight.sh", tmp_path / "unfit", huge, arguments=("--least", "1e6"))
    assert cluster.wait_for_end(job) == "FAILED"
    log = (tmp_path / "unfit.log").read_text()
    assert "UNFIT" in log and "GB free, of" in log and "--exclude=astro1,astro2" in log
    assert "UNFIT: 1e+06 would be enough" in log
