"""The order of rows: a permutation in each epoch, within its window, the same for whoever asks."""

import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines.loading.order import RowOrder

ROWS = np.array([7, 1, 30, 12, 5, 19, 3])


def _epoch(order, epoch):
    return [order[number] for number in range(epoch * len(order), (epoch + 1) * len(order))]


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    st.lists(st.integers(1, 12), min_size=1, max_size=9), st.sampled_from([None, 1, 2, 5]), st.booleans(), st.integers(0, 5)
)
def test_each_row_comes_once_in_each_epoch(rows, window, by_difficulty, seed):
    rows = np.array(rows)
    difficulty = np.random.default_rng(seed).random(len(rows)) if by_difficulty else None
    order = RowOrder(rows, seed=seed, window=window, difficulty=difficulty)
    expected = [(shard, row) for shard, count in enumerate(rows) for row in range(count)]
    for epoch in (0, 7):
        places = _epoch(order, epoch)
        assert {place.epoch for place in places} == {epoch}
        assert sorted(place[1:] for place in places) == expected


@pytest.mark.parametrize("window", [None, 2])
def test_epochs_and_seeds_have_orders_of_their_own(window):
    order, other = (RowOrder(ROWS, seed=seed, window=window) for seed in (0, 1))
    orders = [[place[1:] for place in _epoch(*which)] for which in ((order, 0), (order, 1), (other, 0))]
    for first, second in ((0, 1), (0, 2)):
        same = sum(a == b for a, b in zip(orders[first], orders[second], strict=True))
        assert same < len(order) // 4
    assert [place[1:] for place in _epoch(pickle.loads(pickle.dumps(order)), 1)] == orders[1]


def test_a_shuffle_of_all_rows_mixes_the_files():
    """In any tenth of the epoch a file has about a tenth of its rows: within six standard deviations of a draw without return."""
    rows = np.full(20, 500)
    files = np.array([place.shard for place in _epoch(RowOrder(rows, seed=0), 0)]).reshape(10, -1)
    for part in files:
        counts = np.bincount(part, minlength=20)
        assert np.abs(counts - 50).max() < 6 * np.sqrt(50 * 0.95 * 0.9)


def test_a_window_reads_so_many_files_at_a_time():
    order = RowOrder(ROWS, seed=0, window=3)
    places = _epoch(order, 0)
    seen = list(dict.fromkeys(place.shard for place in places))
    groups = [set(seen[:3]), set(seen[3:6]), set(seen[6:])]
    at = 0
    for group in groups:
        size = int(sum(ROWS[list(group)]))
        assert {place.shard for place in places[at : at + size]} == group
        at += size
    assert seen != sorted(seen)
    again = list(dict.fromkeys(place.shard for place in _epoch(order, 1)))
    assert sorted(again) == sorted(seen) and again != seen


def test_by_difficulty_the_easy_files_come_first_in_each_epoch():
    difficulty = np.array([0.5, 3.0, 1.0, 0.1, 2.0, 0.2, 9.0])
    order = RowOrder(ROWS, seed=0, window=1, difficulty=difficulty)
    for epoch in (0, 3):
        places = _epoch(order, epoch)
        assert list(dict.fromkeys(place.shard for place in places)) == [3, 5, 0, 2, 4, 1, 6]
        assert [place.row for place in places if place.shard == 2] != sorted(range(30))


def test_nothing_grows_with_the_rows():
    """The trillionth row of ten billion is found as quickly as the first, and an order is as small as its files are few."""
    order = RowOrder(np.array([6_000_000_000, 4_000_000_000]), seed=0)
    place = order[10**12 + 7]
    assert place.epoch == 100 and place.shard in (0, 1) and place.row < 6_000_000_000
    assert len(pickle.dumps(order)) < 1000
