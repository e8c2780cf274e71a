"""A real Slurm on this machine: a controller and virtual nodes, each a slurmd with a host name."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
NODES = ("astro1", "astro2")
HOSTS = Path("/etc/hosts")

CONF = """
ClusterName=astropt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its credential has expired
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# no cgroups: containers have none that can be written to
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,batch_sched_delay=0
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=300
CompleteWait=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here."""
    absent = [name for name in PROGRAMS if not _program(name)]
    if absent:
        return f"{', '.join(absent)} not installed (slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons want root"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """The daemons, in a folder of their own, and their users' commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = f"# {folder}"
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        nodes = []
        for node in NODES:
            # fictional hardware; a GPU must be a device whose name ends in its number
            nodes.append(
                f"NodeName={node} NodeAddr=127.0.0.1 Port={free_port()} CPUs=16 Gres=gpu:8 "
                "RealMemory=100000 State=UNKNOWN"
            )
        for gpu in range(8):
            (folder / f"gpu{gpu}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        text = CONF.format(
            host=os.uname().nodename, port=free_port(), folder=folder, nodes="\n".join(nodes)
        )
        (folder / "slurm.conf").write_text(text)

    def start(self) -> None:
        with HOSTS.open("a") as hosts:
            hosts.write("".join(f"127.0.0.1 {node} {self.mark}\n" for node in NODES))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._daemon(
            "munged", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
            *(f"--{kind}-file={self.folder}/munged.{kind}" for kind in ("pid", "log", "seed")),
        )  # fmt: skip
        self._daemon("slurmctld")
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2)

    def stop(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self.run("scancel", "--quiet", "--user=root")
        for node in NODES:
            self.kill_node(node)
        for name in ("slurmctld", "munged"):
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        lines = HOSTS.read_text().splitlines(keepends=True)
        HOSTS.write_text("".join(line for line in lines if self.mark not in line))

    def start_node(self, node: str) -> None:
        # in a namespace where `hostname` is the node's name
        name = 'hostname "$1"; shift; exec "$@"'
        self._daemon("unshare", "-u", "sh", "-c", name, "sh", node, _program("slurmd"), "-N", node)

    def kill_node(self, node: str) -> None:
        """As a power cut: the daemon, and all that jobs run there."""
        pid = self.folder / f"slurmd.{node}.pid"
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
            pid.unlink()
        for process in psutil.process_iter(["environ"]):
            given = process.info["environ"] or {}
            ours = given.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            if ours and given.get("SLURMD_NODENAME") == node:
                with suppress(psutil.NoSuchProcess):
                    parents = [p for p in process.parents() if p.name() == "slurmstepd"]
                    for doomed in (*parents, process):
                        doomed.kill()

    def run(self, *command: str | Path, **more: str) -> str:
        """The output of a command of Slurm's."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **more},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *command: str | Path, **more: str) -> str:
        """The number of a new job."""
        return self.run("sbatch", "--parsable", *command, **more)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def wait_for_end(self, number: str, timeout: float = 120) -> str:
        """The state in which a job, or each task of an array, ends."""
        self.wait_for(lambda: not self.run("squeue", "-h", "-j", number), timeout)
        found = re.findall(r"JobState=(\S*)", self.run("scontrol", "show", "job", "-o", number))
        return " ".join(sorted(set(found)))

    def wait_for(self, condition, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.run("squeue") + self.run("sinfo", "-N")
            time.sleep(0.2)

    def _daemon(self, name: str, *arguments: str) -> None:
        log = (self.folder / f"{name}.err").open("a")
        command = [_program(name), *arguments]
        subprocess.run(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            check=True, timeout=60,
        )  # fmt: skip
