"""Who is at work on what: claims of tasks that know nothing of each other but a common folder.

A claim is a file that only one task can create, on any file system. Its owner touches it now and
then; who finds one whose owner has died, or that nobody touches any more, takes it over. Should two
tasks come to hold the same claim after all, they do the same work twice, and no harm: what is
claimed here is written atomically, and equal whoever does it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

BEAT_S = 15.0  # a claim is touched so often
LOST_S = 120.0  # and lost when it was not for so long: several beats, for slow file systems


class Claims:
    """The claims of this task; a context, in which they are kept alive.

    Args:
        folder: that all tasks see; made if need be.
        lost_s: seconds after which a claim that nobody touches is lost.
    """

    def __init__(self, folder: Path, lost_s: float = LOST_S) -> None:
        self.folder, self.lost_s = folder, lost_s
        folder.mkdir(parents=True, exist_ok=True)
        self._owner = json.dumps(_myself())
        self._held: set[Path] = set()
        # When a claim was first seen as it is. Only differences of this machine's own clock count:
        # those of several machines, and of a file server, need not agree.
        self._seen: dict[Path, tuple[tuple[int, str], float]] = {}
        self._end = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, daemon=True)

    def take(self, name: str) -> bool:
        """Claim something; False where another task that is alive has it."""
        path = self.folder / name
        if not self._create(path):
            lost = self._lost(path)
            if lost is None or not _take_away(path, lost) or not self._create(path):
                return False
        self._held.add(path)
        return True

    def release(self, name: str) -> None:
        """Let go of something."""
        path = self.folder / name
        self._held.discard(path)
        with suppress(FileNotFoundError):
            if path.read_text() == self._owner:  # or it was taken over
                path.unlink()

    def __enter__(self) -> Claims:
        self._beat.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._beat.join()
        for path in list(self._held):
            self.release(path.name)

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with open(descriptor, "w") as file:
            file.write(self._owner)
        return True

    def _lost(self, path: Path) -> str | None:
        """What a claim holds whose owner is gone; None where it is not."""
        try:
            text, touched = path.read_text(), path.stat().st_mtime_ns
        except FileNotFoundError:
            return None  # released this moment
        owner = json.loads(text) if text.endswith("}") else None
        if owner and owner["host"] == _host():
            return None if _alive(owner) else text
        state = (touched, text)
        before, since = self._seen.get(path, (None, 0.0))
        if before != state:
            self._seen[path] = (state, time.monotonic())
            return None
        return text if time.monotonic() - since > self.lost_s else None

    def _keep_alive(self) -> None:
        while not self._end.wait(BEAT_S):
            for path in list(self._held):
                try:
                    os.utime(path)
                except OSError:  # taken over, or the file system is gone for a while
                    continue


def _take_away(path: Path, lost: str) -> bool:
    """Remove a claim that is lost; of several tasks that find it so, one succeeds."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    if aside.read_text() != lost:  # one was faster, and this is its own claim by now
        with suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
        return False
    aside.unlink()
    return True


@cache
def _host() -> str:
    """Where a process number means something: a machine since its start, or a container on it."""
    parts = [socket.gethostname()]
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.is_file():
        parts += [boot.read_text().strip(), str(processes.readlink())]
    return " ".join(parts)


def _myself() -> dict[str, Any]:
    process = psutil.Process()
    me = {"host": _host(), "pid": process.pid, "started": process.create_time()}
    return {**me, "claims": uuid.uuid4().hex}


def _alive(owner: dict[str, Any]) -> bool:
    try:
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 1.0
    except psutil.NoSuchProcess:
        return False
