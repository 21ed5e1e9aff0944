"""Mixtures: how many rows of which source a step has, held against counting row by row."""

from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest

from data_pipelines.loading.mixture import Mixture, Share, Stage, StageConfig, shares_of

weights_of_sources = st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(sum)


def _exact(weights):
    return tuple(Fraction(weight, sum(weights)) for weight in weights)


@hypothesis.given(weights_of_sources, st.integers(0, 500))
def test_each_row_is_one_sources_and_shares_are_kept(weights, rows):
    exact = _exact(weights)
    before, after = shares_of(rows, exact), shares_of(rows + 1, exact)
    assert sum(before) == rows
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0] * (len(weights) - 1) + [1]
    for at, (count, weight) in enumerate(zip(before, exact, strict=True)):
        assert abs(count - rows * weight) < at + 1
        assert weight or not count


@hypothesis.given(weights_of_sources)
def test_sources_end_together_when_their_weights_are_their_rows(weights):
    assert shares_of(sum(weights), _exact(weights)) == weights


def _stages():
    return [
        Stage(0, 64, 5, _exact([3, 1])), Stage(7, 64, 5, _exact([1, 4])), Stage(11, 256, 2, _exact([0, 1])),
        Stage(13, 64, 6, _exact([1, 1])),
    ]  # fmt: skip


def test_rows_follow_one_another_through_the_stages():
    """At each length a source's rows are numbered on, with nothing left out and nothing twice."""
    mixture, given = Mixture(_stages(), None), {64: [0, 0], 256: [0, 0]}
    for step in range(40):
        stage = _stages()[mixture.stage(step)]
        shares = mixture.shares(step)
        assert sum(share.count for share in shares) == stage.batch_size
        for source, share in enumerate(shares):
            assert share.first == given[stage.seq_len][source]
            given[stage.seq_len][source] += share.count
    assert given[256] == [0, 4]
    # 35 rows by 3:1, 20 rows by 1:4, 27 steps of 6 by 1:1; each share rounded by less than two rows.
    assert abs(given[64][0] - (35 * 3 / 4 + 20 / 5 + 27 * 6 / 2)) < 3
    assert sum(given[64]) == 35 + 20 + 27 * 6


def test_the_end_is_where_a_source_has_nothing_left():
    mixture = Mixture(_stages()[:1], {64: [30, 100]})
    given = [share.first + share.count for share in mixture.shares(mixture.steps() - 1)]
    before = [share.first for share in mixture.shares(mixture.steps() - 1)]
    assert before[0] < 30 <= given[0]
    assert Mixture(_stages()[:1], {64: [10**6, 3]}).steps() == 2  # of 5 rows it gives one, of 10 three
    assert Mixture(_stages(), None).steps() > 10**15


def test_a_step_far_away_costs_nothing():
    share = Mixture(_stages(), None).shares(10**14)
    assert share[0].count + share[1].count == 6 and isinstance(share[0], Share)


@pytest.mark.parametrize("name", ["from_step", "seq_len", "batch_size"])
def test_impossible_stages_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        StageConfig(**{"from_step": 1, name: 0})
