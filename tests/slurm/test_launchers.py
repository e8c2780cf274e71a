"""The same training on two nodes, whichever launcher starts it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY, free_port
from tests.distributed.runs import events, losses
from tests.slurm.conftest import NODES

BIN = Path(sys.executable).parent
COURSE = ("run.steps=8", "schedule.decay_until=8", "health.pace_every=4", "zero.stage=3")

pytestmark = pytest.mark.needs("slurm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def by_srun(cluster, tiny, folder):
    """The command under srun, in a batch script of a user's own."""
    return in_a_job(cluster, folder, "srun", f"srun {command('python', tiny, folder / 'srun')}")


def command(start, tiny, run):
    return (
        f"{start} -m astropt_ds.train --config 1m {' '.join(tiny)} {' '.join(COURSE)} run.dir={run}"
    )


def in_a_job(cluster, folder, name, line, state="COMPLETED"):
    script = folder / f"{name}.sh"
    exports = (
        f"export PATH={BIN}:$PATH PYTHONPATH={REPOSITORY} DS_ACCELERATOR=cpu OMP_NUM_THREADS=1"
    )
    script.write_text(f"#!/bin/bash\n{exports}\n{line}\n")
    job = cluster.submit(*NODES, f"--output={folder / name}.log", script)
    assert cluster.wait_for_end(job) == state, (folder / f"{name}.log").read_text()
    return folder / name


def test_srun_alone_makes_ranks_of_its_tasks(by_srun):
    assert len(losses(by_srun)) == 8
    assert events(by_srun, "pace")[0]["host"] == ["astro1", "astro2"]


def test_a_rank_without_its_device_is_named(cluster, tiny, folder):
    run = folder / "deviceless"
    lacking = "[ $SLURM_PROCID = 0 ] || export DS_ACCELERATOR=cuda CUDA_VISIBLE_DEVICES="
    start = f"srun bash -c '{lacking}; {command('exec python', tiny, run)}'"
    in_a_job(cluster, folder, run.name, start, "FAILED")
    log = (folder / "deviceless.log").read_text()
    assert "error: rank 1: astro2: DS_ACCELERATOR=cuda: torch sees no GPU" in log
    assert log.count("error: rank") == 1 and not run.exists(), log


def test_torchrun_on_each_node(cluster, tiny, folder, by_srun):
    port, run = free_port(), folder / "torchrun"
    start = (
        f"torchrun --nnodes 2 --nproc-per-node 1 --node-rank \\$SLURM_NODEID "
        f"--master-addr \\$(scontrol show hostnames | head -n 1) --master-port {port}"
    )
    in_a_job(cluster, folder, "torchrun", f'srun bash -c "{command(start, tiny, run)}"')
    assert events(run, "pace")[0]["host"] == ["astro1", "astro2"]
    assert losses(run) == losses(by_srun)


def test_deepspeed_over_ssh(cluster, tiny, folder, by_srun):
    """In a namespace of processes of its own: its runner ends processes by name, on all hosts."""
    for program in ("pdsh", "ssh-keygen", "sshd"):
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
            pytest.skip(f"{program} is not installed")
    run, port = folder / "deepspeed", free_port()
    key, host = folder / "key", folder / "host"
    for name in (key, host):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", name], check=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host}\nAuthorizedKeysFile {key}.pub\n"
        f"StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile {folder}/sshd.pid\n"
    )
    (folder / "ssh_config").write_text(
        f"Port {port}\nIdentityFile {key}\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        "LogLevel ERROR\n"
    )
    (folder / "hosts").write_text("astro1 slots=1\nastro2 slots=1\n")
    # what is to reach the ranks on the other hosts
    (folder / "environment").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    os.makedirs("/run/sshd", exist_ok=True)
    start = (
        f"deepspeed --hostfile {folder}/hosts --no_ssh_check --master_addr astro1 "
        f"--master_port {free_port()} --module astropt_ds.train"
    )
    line = command("", tiny, run).split("astropt_ds.train", 1)[1]
    script = f"/usr/sbin/sshd -f {folder}/sshd_config && exec {start} {line}"
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PDSH_SSH_ARGS_APPEND": f"-F {folder}/ssh_config",
            "DS_ENV_FILE": str(folder / "environment"),
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 x cpu" in events(run, "start")[0]["text"]
    assert np.array_equal(losses(run), losses(by_srun))
