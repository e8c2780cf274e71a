import itertools

import pytest

from astropt_ds.config_run import SnapshotConfig
from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.training.snapshots import snapshot_steps


def test_log_is_the_series_of_astropts_studies():
    steps = sorted(snapshot_steps(SnapshotConfig(schedule="log"), 30_000))
    assert steps[:8] == [0, 1, 2, 3, 4, 5, 6, 7] and steps[-1] == 30_000
    assert len(steps) == 58  # 64 without the duplicates among the first
    ratios = [b / a for a, b in itertools.pairwise(steps[30:])]
    assert max(ratios) - min(ratios) < 0.02


def test_even_has_as_many_at_equal_distances():
    steps = sorted(snapshot_steps(SnapshotConfig(schedule="even", count=5), 1000))
    assert steps == [0, 250, 500, 750, 1000]


def test_manual_is_what_was_asked_for_and_off_is_none():
    assert snapshot_steps(SnapshotConfig(schedule="manual", steps=(0, 7, 9)), 8) == {0, 7}
    assert snapshot_steps(SnapshotConfig(), 1000) == set()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["snapshot.schedule=manual"], "schedule=manual needs steps"),
        (["snapshot.steps=[1,2]"], "steps needs schedule=manual, not schedule=off"),
        (["snapshot.schedule=log", "snapshot.count=1"], "snapshot.count"),
        (["snapshot.schedule=manual", "snapshot.steps=[-1]"], "snapshot.steps"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(overrides, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        load_config("1m", overrides)
