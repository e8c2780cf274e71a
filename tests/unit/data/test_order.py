import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astropt_ds.data.order import BLOCK, Mixture, Order, dihedral_element, keyed_permutation

shards = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


@given(shards, st.integers(0, 5), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_holds_every_sample_exactly_once(sizes, seed, window, epoch):
    order = Order(sizes, seed, window)
    n = order.samples
    rows = order.rows(epoch * n, (epoch + 1) * n)
    assert sorted(rows.tolist()) == list(range(sum(sizes)))


@given(shards, st.integers(1, 5), st.integers(0, 60), st.integers(0, 60))
def test_a_range_is_its_positions_one_by_one_however_it_is_asked_for(sizes, window, start, length):
    whole = Order(sizes, 0, window).rows(start, start + length).tolist()
    order = Order(sizes, 0, window)
    backwards = [order.rows(p, p + 1)[0] for p in reversed(range(start, start + length))]
    assert whole == backwards[::-1]


@given(shards, st.integers(1, 5))
def test_a_window_of_samples_comes_from_as_many_shards(sizes, window):
    order = Order(sizes, 1, window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order.rows(0, order.samples)]
    runs = [s for i, s in enumerate(shard_of) if s not in shard_of[:i]]  # by first appearance
    last_seen = {s: len(shard_of) - 1 - shard_of[::-1].tolist().index(s) for s in runs}
    for position, shard in enumerate(shard_of):
        still_open = {s for s in shard_of[:position] if last_seen[s] >= position} | {shard}
        assert len(still_open) <= window


def test_epochs_and_seeds_differ():
    order = Order([50, 50], 0, 2)
    first, second = order.rows(0, 100).tolist(), order.rows(100, 200).tolist()
    assert first != second
    assert first != Order([50, 50], 1, 2).rows(0, 100).tolist()
    assert first != list(range(100))


def test_the_order_of_a_released_version_stays():
    """A checkpoint made today must resume tomorrow, on any numpy."""
    assert keyed_permutation(8, "window", 0, 0, 0).tolist() == PINNED_PERMUTATION
    assert Order([3, 0, 4, 2], 7, 2).rows(0, 12).tolist() == PINNED_ROWS
    assert [dihedral_element(0, p) for p in range(8)] == PINNED_ELEMENTS


def test_ten_million_samples_cost_one_window():
    order = Order([1000] * 10_000, 0, 16)
    assert len(order.rows(5_000_000, 5_000_320)) == 320
    assert sum(len(rows) for rows in order._windows.values()) <= 2 * 16_000


def test_nothing_to_order_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        Order([0, 0], 0, 1)


def test_all_eight_symmetries_occur_alike_often():
    counts = np.bincount([dihedral_element(0, p) for p in range(4000)], minlength=8)
    assert len(counts) == 8 and counts.min() > 400


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=4)


def mixture(weights, samples=(90, 7, 400, 1)):
    orders = [Order([n], f"0/{i}", 2) for i, n in enumerate(samples[: len(weights)])]
    return Mixture(orders, weights, seed=0)


@given(weights, st.integers(0, 3 * BLOCK), st.integers(0, 200))
def test_a_mixture_is_the_sources_own_orders_interleaved(weights, start, length):
    mixed = mixture(weights)
    rows = mixed.rows(start, start + length)
    source = np.searchsorted(mixed.first, rows, side="right") - 1
    before, after = mixed.drawn(start), mixed.drawn(start + length)
    for number, order in enumerate(mixed.orders):
        expected = order.rows(before[number], after[number]) + mixed.first[number]
        assert rows[source == number].tolist() == expected.tolist()


@given(weights)
def test_every_block_holds_each_source_by_its_weight(weights):
    drawn = np.array([mixture(weights).drawn(n * BLOCK) for n in range(4)])
    shares = np.diff(drawn, axis=0)
    assert (shares == shares[0]).all() and (shares.sum(axis=1) == BLOCK).all()
    assert shares.min() >= 1
    wanted = np.array(weights) / sum(weights)
    assert np.abs(shares[0] / BLOCK - wanted).max() <= 4 / BLOCK


def test_a_mixture_of_one_is_its_order():
    order = Order([5, 9], 3, 2)
    assert (Mixture([order], [7.0], 3).rows(0, 5000) == order.rows(0, 5000)).all()


def test_the_mixture_of_a_released_version_stays():
    assert mixture([3, 1]).rows(0, 12).tolist() == PINNED_MIXTURE


PINNED_PERMUTATION = [6, 3, 1, 5, 0, 4, 7, 2]
PINNED_ROWS = [7, 8, 1, 4, 0, 6, 5, 2, 3, 6, 2, 1]
PINNED_ELEMENTS = [3, 7, 3, 6, 0, 0, 3, 3]
PINNED_MIXTURE = [92, 41, 15, 31, 70, 27, 89, 87, 95, 73, 56, 37]
