"""Repeated n-grams against loops over Python's tuples, over answers with padding and with tools between."""

import random

import numpy as np
import pytest

from lfm_jax.generation.repetition import ngram_penalty, repeated_share, repeated_tokens, token_penalty


def _answers(row, mask):
    """The parts of a row that are the answer's, as (start, tokens)."""
    parts, part = [], []
    for place, (token, ours) in enumerate(zip(row, mask, strict=True)):
        if ours:
            part = part or [place, []]
            part[1].append(token)
        elif part:
            parts, part = [*parts, part], []
    return [*parts, part] if part else parts


def _slowly(row, mask, n):
    """(1 - unique / all, which tokens are of an n-gram that stood before), by a set of tuples."""
    seen, total, again = set(), 0, [False] * len(row)
    for start, tokens in _answers(row, mask):
        for place in range(len(tokens) - n + 1):
            gram = tuple(tokens[place : place + n])
            total += 1
            if gram in seen:
                again[start + place : start + place + n] = [True] * n
            seen.add(gram)
    return 1 - len(seen) / total if total else 0.0, again


def _batch(seed, batch=12, seq=96):
    """Rows of few tokens, or that come back to what they said; masks with padding at both ends and holes."""
    draws = random.Random(seed)
    rows, masks = [], []
    for _ in range(batch):
        alphabet, back = draws.choice((1, 2, 4, 70_000)), draws.randrange(1, 50)
        row = []
        for place in range(seq):
            row.append(row[place - back] if place >= back and draws.random() < 0.95 else draws.randrange(alphabet))
        begin, end, holes = draws.randrange(seq), draws.randrange(seq + 1), draws.choice((0.0, 0.03))
        rows.append(row)
        masks.append([begin <= place < max(end, begin) and draws.random() >= holes for place in range(seq)])
    return np.array(rows), np.array(masks)


@pytest.mark.parametrize("n", [*range(1, 9), 16, 17, 31, 32, 33, 40, 96, 97])
def test_ngrams_are_counted_as_by_hand(n):
    """TRAPS 34. Also longer ones than the rows."""
    repeats = 0
    for seed in range(3):
        tokens, mask = _batch(seed)
        mask[0] = True
        shares, again = zip(*(_slowly(row.tolist(), of, n) for row, of in zip(tokens, mask, strict=True)), strict=True)
        np.testing.assert_allclose(repeated_share(tokens, mask, n), shares, rtol=0, atol=1e-15)
        np.testing.assert_array_equal(repeated_tokens(tokens, mask.astype(np.int32), n), again)
        np.testing.assert_allclose(ngram_penalty(tokens, mask, n, -0.5), -0.5 * np.array(shares), rtol=0, atol=1e-15)
        np.testing.assert_array_equal(token_penalty(tokens, mask, n, -0.05), np.where(again, -0.05, 0.0))
        repeats += np.sum(again)
    assert repeats > 100 or n > 90


def test_a_row_does_not_depend_on_its_neighbours_and_padding():
    tokens, mask = _batch(7)
    shares = repeated_share(tokens, mask, 3)
    for row in range(len(tokens)):
        assert repeated_share(tokens[row : row + 1], mask[row : row + 1], 3)[0] == shares[row]
    filled = np.where(mask, tokens, 123_456)
    np.testing.assert_array_equal(repeated_share(filled, mask, 3), shares)
    wider = repeated_tokens(np.pad(tokens, ((0, 0), (5, 9))), np.pad(mask, ((0, 0), (5, 9))), 3)
    np.testing.assert_array_equal(wider[:, 5:-9], repeated_tokens(tokens, mask, 3))
    assert not wider[:, :5].any() and not wider[:, -9:].any()


def test_closed_forms():
    """Equal tokens; a period p, of which p n-grams differ; Welleck's own example is nothing but this."""
    size, n = 50, 4
    rows = np.array([[7] * size, [place % 5 for place in range(size)], range(size)])
    np.testing.assert_allclose(repeated_share(rows, np.ones_like(rows), n), [1 - 1 / 47, 1 - 5 / 47, 0], rtol=1e-15)
    # The first period is nobody's repetition; the n-gram that is the first to be one begins the second period.
    np.testing.assert_array_equal(repeated_tokens(rows, np.ones_like(rows), n)[1], [False] * 5 + [True] * 45)


def test_what_stands_in_the_prompt_or_is_said_by_a_tool_is_nobody_s_repetition():
    """TRAPS 31: prompt, call, the tool's answer, and the answer that cites it."""
    tokens = np.array([[1, 2, 3, 4, 9, 1, 2, 3, 4, 9, 1, 2, 3, 4]])
    mask = np.array([[0] * 5 + [1] * 4 + [0] + [0] * 4])
    assert repeated_share(tokens, mask, 3)[0] == 0 and not repeated_tokens(tokens, mask, 3).any()
    mask[0, 10:] = 1
    np.testing.assert_array_equal(repeated_tokens(tokens, mask, 3)[0], [False] * 10 + [True] * 4)


def test_a_small_n_punishes_a_table_and_a_large_one_does_not():
    """The published trap, by numbers: rows of a table share their bars, a loop shares everything."""
    table = [token for row in range(16) for token in (1, 100 + row, 2, 3, 200 + row, 2, 3, 300 + row, 4)]
    loop = list(range(9)) * 16
    tokens = np.array([table, loop])
    by_n = {n: repeated_share(tokens, np.ones_like(tokens), n) for n in (2, 3, 10)}
    assert by_n[2][0] > 0.3 and by_n[10][0] == 0 and min(share[1] for share in by_n.values()) > 0.9


def test_batches_without_rows_or_tokens_have_no_repetition():
    for shape in ((0, 5), (3, 0)):
        tokens = np.zeros(shape, np.int32)
        assert repeated_share(tokens, tokens, 2).tolist() == [0.0] * shape[0]
        assert repeated_tokens(tokens, tokens, 2).shape == shape


def test_what_is_no_penalty_is_refused():
    tokens = np.zeros((2, 5), np.int32)
    for penalty in (ngram_penalty, token_penalty):
        with pytest.raises(ValueError, match="a penalty is negative or 0, got 0.5"):
            penalty(tokens, tokens, 2, 0.5)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"an n-gram has at least 1 token, got n = {n}"):
            repeated_share(tokens, tokens, n)
    for wrong, shape in ((tokens[0], "5,"), (tokens[:1], "1, 5")):
        with pytest.raises(ValueError, match=rf"tokens and mask must be \[batch, seq\], got \(2, 5\) and \({shape}\)"):
            repeated_share(tokens, wrong, 2)
