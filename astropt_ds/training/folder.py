"""A run's folder: seen by all nodes, written by one run at a time."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from pathlib import Path
from typing import IO

from astropt_ds.config_run import RunConfig
from astropt_ds.errors import UserError, say
from astropt_ds.files import replace_durably, sweep, write_durably
from astropt_ds.training.checkpoint import POINTER
from astropt_ds.training.metrics import METRICS
from astropt_ds.training.ranks import Ranks

COMPLETE, REQUEUE = "complete", "requeue"  # how the run ended: for people and for scripts
LOCK, PROBE = ".lock", ".seen"
# for a network's file system to show a new file, or to forget a dead node's lock
PATIENCE_S = 120.0
PATIENCE_HERE_S = 10.0  # for a run on the same machine that is about to end


class RunFolder:
    """The folder of a run, held until :meth:`close`. Made on all ranks.

    Args:
        config: names it.
        ranks: all of which must see it.

    Attributes:
        path: where it is.
        warnings: what to know about it.

    Raises:
        UserError: it is not named, not writable, not the same one on all nodes, in use by another
            run, or holds a run that may not be resumed.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        if config.dir is None:
            raise UserError("run.dir is missing: a folder for the run, for example run.dir=runs/1m")
        self.path = Path(config.dir)
        self.warnings: list[str] = []
        self._lock: IO[str] | None = None
        with ranks.together():
            if ranks.main:
                self._check(config.resume)
                self._lock = self._take_lock()
                sweep(self.path)
        self._check_shared(ranks)

    def mark(self, name: str, text: str) -> None:
        """Say how the run ended, in a file of that name and no other."""
        self.unmark()
        replace_durably(self.path / name, text + "\n")

    def unmark(self) -> None:
        """The run goes on."""
        for name in (COMPLETE, REQUEUE):
            (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another run have the folder."""
        if self._lock:
            self._lock.truncate(0)
            self._lock.close()

    def _check(self, resume: str) -> None:
        if resume == "never" and any((self.path / name).exists() for name in (METRICS, POINTER)):
            raise UserError(
                f"run.dir={self.path}: holds a run already and run.resume=never; "
                "name another folder, or run.resume=auto"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir={self.path}: no folder can be made there ({error})") from None

    def _take_lock(self) -> IO[str]:
        path = self.path / LOCK
        try:
            lock = path.open("a+")
        except OSError as error:
            raise UserError(f"run.dir={self.path}: cannot be written to ({error})") from None
        start = time.monotonic()
        deadline, waits = start + PATIENCE_S, False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                holder = f"{path} is held by {lock.read().strip() or 'another run'}"
                if holder.endswith(f" on {socket.gethostname()}"):  # no dead node's: it is alive
                    deadline = min(deadline, start + PATIENCE_HERE_S)
                if time.monotonic() > deadline:
                    raise UserError(
                        f"run.dir={self.path}: another run is at work in it ({holder}); wait for "
                        "its end, or name another folder"
                    ) from None
                if not waits:
                    say(f"{holder}: waiting for it, {deadline - start:.0f} s at most")
                waits = True
                time.sleep(0.2)
            except OSError as error:
                self.warnings.append(f"no lock keeps other runs out of {self.path} ({error})")
                return lock
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return lock

    def _check_shared(self, ranks: Ranks) -> None:
        """What rank 0 writes, all must read: else their parts of a checkpoint would never meet."""
        probe = self.path / PROBE
        token = ranks.gather(secrets.token_hex(8))[0]
        with ranks.together():
            if ranks.main:
                write_durably(probe, token)
        with ranks.together():
            deadline = time.monotonic() + PATIENCE_S
            while not _holds(probe, token):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"run.dir={self.path}: on {socket.gethostname()} in {os.getcwd()} this is "
                        "another folder than rank 0's; one that all nodes share would be right"
                    )
                time.sleep(0.2)
        if ranks.main:
            probe.unlink()


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False
