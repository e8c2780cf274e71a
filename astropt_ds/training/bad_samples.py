"""The samples of a run that failed: counted, and a stop where they are too many."""

from __future__ import annotations

from collections.abc import Mapping

from astropt_ds.config import Config
from astropt_ds.data.reader import Fault
from astropt_ds.errors import UserError
from astropt_ds.training.metrics import METRICS

ENOUGH_SAMPLES = 1000  # before the fraction of bad ones means something
SEVERAL = 8  # bad images of a shard before their fraction does


class BadSamples:
    """What failed so far, the same on all ranks.

    Args:
        config: the run's.
        shard_samples: images in each shard, by the name that faults have.

    Attributes:
        count: samples that failed.
    """

    def __init__(self, config: Config, shard_samples: Mapping[str, int]) -> None:
        self.config = config
        self.shard_samples = shard_samples
        self.count = 0
        self._keys: dict[str, set[str]] = {}  # of each shard

    def add(self, faults: list[Fault], step: int) -> None:
        """Count a step's failures.

        Args:
            faults: of all ranks.
            step: batches consumed, this one included.

        Raises:
            UserError: they are too many, of all samples or of a shard.
        """
        for fault in faults:
            self._check_shard(fault)
        # the fraction of a few samples means little, unless none of them can be used
        images = self.config.batch.global_images
        enough = images if len(faults) == images else ENOUGH_SAMPLES
        self.check(step, max(step * images, enough))

    def check(self, step: int, of: int | None = None) -> None:
        """See that no more than the allowed fraction failed, of all samples so far if not given.

        Raises:
            UserError: more did.
        """
        samples = step * self.config.batch.global_images
        if self.count > self.config.data.max_bad_fraction * (of or samples):
            raise UserError(
                f"{self.count} of {samples} samples failed, more than "
                f"data.max_bad_fraction={self.config.data.max_bad_fraction} allows; each is a "
                f"bad_sample in {self.config.run.dir}/{METRICS}: mend the shards, or allow more"
            )

    def _check_shard(self, fault: Fault) -> None:
        """Stop at a shard that is bad as a whole: more than half of its images, and several."""
        bad = self._keys.setdefault(fault.shard, set())
        bad.add(fault.key)
        of = self.shard_samples[fault.shard]
        allowed = max(0.5, self.config.data.max_bad_fraction)
        if len(bad) >= SEVERAL and len(bad) > allowed * of:
            raise UserError(
                f"{fault.shard}: {len(bad)} of its {of} images could not be used, the last, "
                f"{fault.key}: {fault.reason}; tools/verify_shards.py says what is wrong"
            )
