"""What a person sees while a run goes on: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time

from tqdm import tqdm

LOG_SECONDS = 10.0
SMOOTHING = 0.1  # weight of the newest step in the displayed rate


class Progress:
    """Progress of a run. Made on rank 0 only.

    Args:
        step: where it starts.
        steps: where it ends.
        tokens_per_image: for the rate in tokens.
    """

    def __init__(self, step: int, steps: int, tokens_per_image: int) -> None:
        self.steps = steps
        self.tokens_per_image = tokens_per_image
        self._seconds: float | None = None  # a step takes, smoothed
        self._last_line = 0.0
        self._bar = tqdm(
            initial=step,
            total=steps,
            unit="step",
            disable=None,  # on a terminal only
            bar_format="{n_fmt}/{total_fmt} |{bar}| {desc}",
        )

    def update(self, step: int, loss: float, lr: float, images: int, seconds: float) -> None:
        """Show a step that took so many images and seconds."""
        before = self._seconds
        self._seconds = seconds if before is None else before + SMOOTHING * (seconds - before)
        rate = images / self._seconds
        left = datetime.timedelta(seconds=round((self.steps - step) * self._seconds))
        text = (
            f"loss {loss:.4f}  lr {lr:.2e}  {rate:,.1f} images/s  "
            f"{rate * self.tokens_per_image:,.0f} tokens/s  ETA {left}"
        )
        if not self._bar.disable:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line > LOG_SECONDS or step == self.steps:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        with contextlib.suppress(OSError):  # a full disk under the log is no reason to end
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
