"""Why a run is to end early: a signal, its time is up, or its launcher is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from astropt_ds.errors import say

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# Launchers pass a signal on that a scheduler or a terminal has sent to all processes already.
ONE_SIGNAL_S = 1.0


class Interruption:
    """Turns a signal into a wish to stop at the end of a step; a second one ends the process.

    SIGTERM, SIGUSR1 and SIGUSR2 are what schedulers send before they kill, SIGINT is Ctrl-C. To be
    entered on the main thread, after the reading processes are forked.

    Args:
        max_hours: after which the wish arises by itself; never if None.

    Attributes:
        reason: what asked for the stop, in words; None as long as nothing did.
        since: when it did, in seconds since the epoch.
    """

    def __init__(self, max_hours: float | None) -> None:
        self.reason: str | None = None
        self.since = 0.0
        self._hours = max_hours
        self._start = time.monotonic()
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ
        self._launcher = os.getppid()

    def wanted(self) -> bool:
        """Whether this process wants the run to stop."""
        hours = (time.monotonic() - self._start) / 3600
        if self._hours is not None and hours >= self._hours:
            self._ask(f"run.max_hours={self._hours}")
        if self._launched and os.getppid() != self._launcher:
            self._ask("the end of torchrun")
        return self.reason is not None

    def __enter__(self) -> Interruption:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # The interpreter's own handlers run between two steps of Python, which a collective that
        # hangs never reaches; a thread at the end of this pipe hears of every signal at once.
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _listen(self) -> None:
        first = None
        while number := os.read(self._reader, 1):
            if number[0] not in SIGNALS:
                continue
            name, now = signal.Signals(number[0]).name, time.monotonic()
            if first is None:
                first = now
                self._ask(name)
                say(f"{name}: saving after this step; once more ends at once")
            elif now - first > ONE_SIGNAL_S:
                say(f"{name} again: ending at once")
                os._exit(128 + number[0])

    def _ask(self, reason: str) -> None:
        if self.reason is None:
            self.since = time.time()
            self.reason = reason


def _ignore(number: int, frame: Any) -> None:
    """What happens is the thread's to decide."""
