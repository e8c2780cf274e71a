import os
from itertools import product

import pytest

from astropt_ds.training.slurm import PORTS, adopt_step, expand_counts, first_host

TASK = {
    "SLURM_JOB_ID": "81234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "8,4(x3)",
    "SLURM_STEP_NODELIST": "gpu[017-018,031],gpu044",
}


@pytest.fixture
def adopt(monkeypatch):
    """What a task with this environment is to torch."""

    def adopt(given):
        with monkeypatch.context() as context:
            context.setattr(os, "environ", dict(given))
            adopt_step()
            return {name: value for name, value in os.environ.items() if name not in TASK}

    return adopt


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("astro1", "astro1"),
        ("astro1,astro2", "astro1"),
        ("gpu[03-07,12],login1", "gpu03"),
        ("gpu[5,7]", "gpu5"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("node-a[2-3]-ib,x", "node-a2-ib"),
    ],
)
def test_the_first_of_slurms_hosts(nodes, first):
    assert first_host(nodes) == first


def test_tasks_of_each_node():
    assert expand_counts("8(x2),4") == [8, 8, 4]
    assert expand_counts("1") == [1]


def test_a_task_is_a_rank(adopt):
    assert adopt(TASK) == {
        "RANK": "9",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu017",
        "MASTER_PORT": "11234",
    }


def test_jobs_steps_and_starts_that_follow_each_other_do_not_share_a_port(adopt):
    ports = [
        int(
            adopt(
                {
                    **TASK,
                    "SLURM_JOB_ID": str(job),
                    "SLURM_STEP_ID": str(step),
                    "SLURM_RESTART_COUNT": str(start),
                }
            )["MASTER_PORT"]
        )
        for job, step, start in product((81234, 81235, 81236), (0, 1), (0, 1, 2))
    ]
    assert len(set(ports)) == len(ports) and set(ports) <= set(PORTS)


def test_what_a_launcher_or_a_user_has_set_stays(adopt):
    assert adopt({**TASK, "RANK": "0"}) == {"RANK": "0"}  # torchrun's, under srun
    assert adopt({**TASK, "MASTER_ADDR": "ib0"})["MASTER_ADDR"] == "ib0"


@pytest.mark.parametrize(
    "given",
    [
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        TASK | {"SLURM_PTY_PORT": "40000"},  # the shell of srun --pty, of a step of many tasks
    ],
)
def test_what_runs_alone_is_no_rank(adopt, given):
    assert not {"RANK", "MASTER_PORT"} & adopt(given).keys()
