"""Middles told last: nothing is lost, and a document can be put together again."""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from data_pipelines.loading.fill_in_the_middle import chosen_documents, grown_lengths, move_middle

PRE, SUF, MID = 3, 5, 4


def _put_together(ids):
    """The document, by the symbols alone."""
    ids = ids.tolist()
    suffix, middle = ids.index(SUF), ids.index(MID)
    assert ids[0] == PRE and 0 < suffix < middle
    return ids[1:suffix] + ids[middle + 1 :] + ids[suffix + 1 : middle]


@hypothesis.given(st.lists(st.integers(10, 99), max_size=30), st.integers(0, 1000))
def test_a_document_can_be_put_together_again(ids, seed):
    moved = move_middle(np.array(ids, np.uint16), (PRE, SUF, MID), (seed,))
    assert len(moved) == len(ids) + 3
    assert _put_together(moved) == ids


def test_cuts_are_drawn_evenly():
    """The mean length of each part is a third of the document's: 2,000 draws have a standard error of 0.5 % of it."""
    ids = np.arange(10, 310)
    parts = np.array([np.flatnonzero(np.isin(move_middle(ids, (PRE, SUF, MID), (seed,)), (SUF, MID))) for seed in range(2000)])
    prefix, suffix = parts[:, 0] - 1, parts[:, 1] - parts[:, 0] - 1
    for part in (prefix, suffix, 300 - prefix - suffix):
        assert abs(part.mean() - 100) < 6


def test_documents_are_chosen_by_chance_among_those_that_fit():
    lengths = np.random.default_rng(0).integers(0, 200, 20_000)
    chosen = chosen_documents(lengths, 128, 0.3, 5)
    assert not chosen[lengths + 4 > 128].any()
    assert abs(chosen[lengths + 4 <= 128].mean() - 0.3) < 0.03
    np.testing.assert_array_equal(chosen, chosen_documents(lengths, 128, 0.3, 5))
    assert (chosen != chosen_documents(lengths, 128, 0.3, 6)).any()
    assert not chosen_documents(lengths, 128, 0.0, 5).any()
    np.testing.assert_array_equal(grown_lengths(lengths, chosen) - lengths, 3 * chosen)
