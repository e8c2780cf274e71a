"""What a person sees while a table is made: galaxies, their rate, the time left, of all tasks."""

from __future__ import annotations

import contextlib
import datetime
import time

from tqdm import tqdm

LOOK_S = 2.0  # between two looks at what all tasks have finished
LOG_S = 30.0  # between two lines in a log


class Progress:
    """Progress of a table.

    Args:
        done: galaxies that are in it already.
        total: that it is to hold.
        shown: whether anything is to be seen.
    """

    def __init__(self, done: int, total: int, shown: bool = True) -> None:
        self._shown = shown
        self._total, self._first, self._done = total, done, done
        self._start = time.monotonic()
        self._looked = self._said = self._start
        self._bar = tqdm(
            initial=done,
            total=total,
            unit=" galaxies",
            disable=None if shown else True,
            desc="embedding",
        )

    def is_due(self) -> bool:
        """Whether it is time for another look."""
        return time.monotonic() - self._looked > LOOK_S

    def update(self, done: int) -> None:
        """Show how many galaxies all tasks together have finished."""
        now = self._looked = time.monotonic()
        self._bar.update(done - self._done)
        self._done = done
        if self._shown and self._bar.disable and now - self._said > LOG_S:
            self._said = now
            rate = (done - self._first) / (now - self._start)
            left = ""
            if rate:
                seconds = round((self._total - done) / rate)
                left = f", {datetime.timedelta(seconds=seconds)} left"
            with contextlib.suppress(OSError):  # a full disk under the log is no reason to end
                print(f"{done:,} of {self._total:,} galaxies, {rate:,.1f}/s{left}", flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
