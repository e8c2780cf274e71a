"""What torch's profiler sees of some steps: a Chrome trace of each rank, on request."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from astropt_ds.errors import say
from astropt_ds.training.ranks import Ranks


class Trace:
    """Traces the steps that ``run.trace`` names, and what lies between them.

    Args:
        steps: the first one, and the one after the last; none if None.
        folder: for the files, ``step-NNNNNNNN-rank-NNNNN.json.gz`` by the first step in them.
        ranks: the run's processes.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, ranks: Ranks) -> None:
        self.steps, self.folder, self._rank = steps or (0, 0), folder, ranks.rank
        self._activities = [ProfilerActivity.CPU]
        if ranks.device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None
        self._first = 0

    def turn(self, step: int) -> bool:
        """Begin or end, where it is time to after so many steps; whether it was."""
        wanted = self.steps[0] <= step + 1 < self.steps[1]
        if wanted == (self._profile is not None):
            return False
        if wanted:
            self._first = step + 1
            self._profile = profile(activities=self._activities)
            self._profile.start()
        else:
            self.close()
        return True

    def close(self) -> None:
        """End, and write what there is; a full disk costs the trace and not the run."""
        if self._profile is None:
            return
        self._profile.stop()
        path = self.folder / f"step-{self._first:08d}-rank-{self._rank:05d}.json.gz"
        try:
            self.folder.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(path))
        except OSError as error:
            say(f"warning: {path} could not be written ({error})", once=False)
        self._profile = None
