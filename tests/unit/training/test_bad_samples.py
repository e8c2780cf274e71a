import pytest

from astropt_ds.config_source import load_config
from astropt_ds.data.reader import Fault
from astropt_ds.errors import UserError
from astropt_ds.training.bad_samples import BadSamples


def samples(fraction, **shards):
    overrides = [f"data.max_bad_fraction={fraction}", "batch.global_images=10", "run.dir=runs/a"]
    return BadSamples(load_config("1m", overrides), shards)


def fail(bad, step, shard, keys):
    faults = [Fault(shard, str(key), "cut off") for key in keys]
    bad.count += len(faults)
    bad.add(faults, step)


def test_more_than_half_of_a_shard_stops_a_run_whatever_the_order_of_its_images():
    bad = samples(0.4, a=20, b=20)
    for step in range(1, 11):
        fail(bad, step, "a", [step])
    fail(bad, 11, "a", [3])  # known already: an epoch later, say
    with pytest.raises(UserError, match="a: 11 of its 20 images could not be used, the last, 19"):
        fail(bad, 12, "a", [19])


def test_a_small_shard_is_left_to_the_fraction_of_all():
    bad = samples(0.05, a=3)
    fail(bad, 1, "a", [0, 1, 2])


def test_the_fraction_counts_once_there_are_enough_samples_or_none_is_good():
    bad = samples(0.05, a=10**6)
    for step in range(1, 11):
        fail(bad, step, "a", range(10 * step, 10 * step + 5))  # 50 of 100: of 1,000 they are few
    with pytest.raises(UserError, match="60 of 110 samples failed, more than .*=0.05 allows"):
        fail(bad, 11, "a", range(200, 210))  # a batch without a good one
    bad.count = 4
    with pytest.raises(UserError, match="4 of 20 samples failed.* bad_sample in runs/a/metrics"):
        bad.check(2)


def test_who_allows_all_gets_all():
    bad = samples(1, a=10)
    fail(bad, 1, "a", range(10))
