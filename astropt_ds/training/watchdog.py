"""A run that stands still is ended, and every rank leaves its stack behind."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from astropt_ds.errors import say

EXIT_HANG = 70  # EX_SOFTWARE of sysexits.h
GRACE_S = 10.0  # for the other ranks to write theirs before a launcher kills them


class Watchdog:
    """Ends this process when nothing has moved for too long.

    Every rank has one: where one hangs, all others wait for it in their next collective, and the
    stacks of all tell which one it was.

    Args:
        folder: for the stacks, one file a rank.
        minutes: without a call of :meth:`alive`.
        rank: this process.
        tell: is told of the end, in one line.
    """

    def __init__(
        self, folder: Path, minutes: float, rank: int, tell: Callable[[str], None]
    ) -> None:
        self.folder, self.seconds, self.rank = folder, 60 * minutes, rank
        self._tell = tell
        self._stderr = os.dup(2)  # even if Python's own is replaced
        self.alive()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def alive(self) -> None:
        """Something has moved."""
        self._last = time.monotonic()
        # Where even the thread below is held up, by an extension that keeps the interpreter's lock
        # or by the disk that the stacks go to, this one is not: it is written in C.
        faulthandler.dump_traceback_later(self.seconds + 3 * GRACE_S, exit=True, file=self._stderr)

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        os.close(self._stderr)

    def _watch(self) -> None:
        while not self._ended.wait(max(0.0, self._last + self.seconds - time.monotonic())):
            if time.monotonic() - self._last >= self.seconds:
                self._end()

    def _end(self) -> None:
        path = self.folder / f"rank-{self.rank:05d}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                place = f"rank {self.rank}, process {os.getpid()} on {socket.gethostname()}"
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"{now}: {place} made no step for {self.seconds:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # the folder itself may be what hangs or is full
            print(f"{path}: {error}", file=sys.stderr)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        text = (
            f"no step for {self.seconds / 60:g} minutes (health.hang_minutes); every rank that "
            f"could has left its stack in {self.folder}"
        )
        say(f"error: {text}; the same command goes on from the last checkpoint")
        self._tell(text)
        time.sleep(GRACE_S)
        os._exit(EXIT_HANG)
