"""Runs of the training command, watched and read back."""

from __future__ import annotations

import hashlib
import json
import time

import psutil

from astropt_ds.training.metrics import read_metrics

SCRIPT = ("-m", "astropt_ds.train")


def train(launch, tiny, run, ranks, *overrides, script=SCRIPT, **options):
    """The command on several ranks, in the folder ``run``."""
    command = (*script, "--config", "1m", *tiny, f"run.dir={run}")
    return launch(ranks, *command, *overrides, **options)


def alone(launch, tiny, run, *overrides, **options):
    """The command as one process, whose exit code no launcher changes."""
    return train(launch, tiny, run, 1, *overrides, launcher="python", **options)


def records(run, kind="train"):
    return [record for record in read_metrics(run) if record["kind"] == kind]


def events(run, name):
    return [record for record in records(run, "event") if record["event"] == name]


def losses(run):
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records(run)]


def wait_for_step(run, step):
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(records(run)) < step:
        assert time.monotonic() < deadline, "the run does not get anywhere"
        time.sleep(0.02)


def ranks_of(run):
    """The processes of the ranks of a run under a launcher, the first first."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = process.info["cmdline"] or []
        if f"run.dir={run}" in command and "torch.distributed.run" not in command:
            parent = process.parent()
            if parent and "torch.distributed.run" in parent.cmdline():
                found.append((int(process.info["environ"]["RANK"]), process))
    return [process for _, process in sorted(found, key=lambda item: item[0])]


def process_of(run):
    """The process of a run without a launcher; its reading processes are its children."""
    found = [p for p in psutil.process_iter(["cmdline"]) if f"run.dir={run}" in p.info["cmdline"]]
    return next(p for p in found if p.parent() not in found)


def damage(path):
    """What is wrong with a checkpoint, found without the code that is under test."""
    try:
        manifest = (path / "manifest.json").read_bytes()
        if hashlib.sha256(manifest).hexdigest() != (path / "complete").read_text().strip():
            return f"{path}: manifest.json"
        for name, facts in json.loads(manifest)["files"].items():
            if hashlib.sha256((path / name).read_bytes()).hexdigest() != facts["sha256"]:
                return f"{path}: {name}"
    except FileNotFoundError as error:
        return str(error)
    return None
