"""How much answers repeat themselves, and what that costs them in reinforcement learning: n-grams of token ids.

Batches of answers, one in each row, [batch, seq]; a mask, [batch, seq], says which tokens are the answer's. An n-gram is n tokens
in a row that are all the answer's: none reaches over padding, or over what a tool said between two parts of it, and what the
prompt or a tool has said is not repeated by being said once. On the host; exact; a sort of all tokens for each doubling of n.

What a small n does: JSON, tables, equations and code repeat 3 tokens all the time, and a model learns to avoid those rather than
loops. For reasoning take n of 10 to 40. And a penalty can be evaded by answering in fewer words: look at the length beside it.
"""

import numpy as np


def repeated_share(tokens: np.ndarray, mask: np.ndarray, n: int) -> np.ndarray:
    """1 - unique / all n-grams of each row, [batch] float64; 0 where a row has none.

    seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319).

    Args:
      tokens: [batch, seq] integers. mask: [batch, seq], not 0 where a token is the answer's.
      n: tokens of an n-gram.

    Raises:
      ValueError: n is below 1, or the two are of different shapes.
    """
    whole, first = _ngrams(tokens, mask, n)
    total = whole.sum(axis=1)
    return (total - first.sum(axis=1)) / np.maximum(total, 1)


def ngram_penalty(tokens: np.ndarray, mask: np.ndarray, n: int, max_penalty: float) -> np.ndarray:
    """The reward, of 0 down to `max_penalty`, for repeating n-grams: one number for each answer, [batch] float64.

    repeated_share * max_penalty, over token ids: `get_repetition_penalty_reward` of TRL 1.16, after appendix C.2 of Yeo et al.
    2025 (arXiv 2502.03373), which adds it to wrong answers only.

    Raises:
      ValueError: `max_penalty` is positive, or as of `repeated_share`.
    """
    return repeated_share(tokens, mask, n) * _checked(max_penalty)


def repeated_tokens(tokens: np.ndarray, mask: np.ndarray, n: int) -> np.ndarray:
    """Which tokens belong to an n-gram that stood in the answer before, [batch, seq] bool. Arguments as of `repeated_share`."""
    whole, first = _ngrams(tokens, mask, n)
    covered = np.zeros((len(whole), whole.shape[1] + n), np.int64)  # +1 where an n-gram begins, -1 behind its end
    covered[:, :-n] += whole & ~first
    covered[:, n:] -= whole & ~first
    return np.cumsum(covered, axis=1)[:, : np.shape(tokens)[1]] > 0


def token_penalty(tokens: np.ndarray, mask: np.ndarray, n: int, penalty: float) -> np.ndarray:
    """The reward for repeating n-grams, token by token: `penalty` at each of `repeated_tokens`, once, [batch, seq] float64.

    What Yeo et al. 2025 trained with (section 4.5; n 40, penalty -0.05): it blames the repetition and not the answer. Theirs also
    reaches the token behind the n-gram (eddycmu/demystify-long-cot#10); ours does not.

    Raises:
      ValueError: `penalty` is positive, or as of `repeated_share`.
    """
    return repeated_tokens(tokens, mask, n) * _checked(penalty)


def _checked(penalty: float) -> float:
    if penalty > 0:
        raise ValueError(f"a penalty is negative or 0, got {penalty}: a positive one would reward repetition")
    return penalty


def _ngrams(tokens: np.ndarray, mask: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(whether an n-gram of the answer begins there, whether it is the first of its kind in its row), [batch, seq - n + 1]."""
    tokens, mask = np.asarray(tokens), np.asarray(mask) != 0
    if n < 1:
        raise ValueError(f"an n-gram has at least 1 token, got n = {n}")
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise ValueError(f"tokens and mask must be [batch, seq], got {tokens.shape} and {mask.shape}")
    batch, seq = tokens.shape
    starts = max(seq - n + 1, 0)
    if not starts or not batch:
        return np.zeros((batch, starts), bool), np.zeros((batch, starts), bool)
    counted = np.pad(np.cumsum(mask, axis=1), ((0, 0), (1, 0)))
    whole = counted[:, n:] - counted[:, :-n] == n
    ids = _ngram_ids(tokens, n)
    places = np.flatnonzero(whole)
    rows = places // starts
    _, firsts = np.unique(rows * (ids.max() + 1) + ids.ravel()[places], return_index=True)
    first = np.zeros(batch * starts, bool)
    first[places[firsts]] = True
    return whole, first.reshape(batch, starts)


def _ngram_ids(tokens: np.ndarray, n: int) -> np.ndarray:
    """A number for the n tokens from each place on, [batch, seq - n + 1]: the same where they are the same, and only there.

    Two numbers of shorter n-grams make that of a longer one, which may be twice as long (Karp, Miller & Rosenberg 1972).
    """
    ids, length = _ranks(tokens), 1
    while length < n:
        further = min(length, n - length)
        ids = _ranks(ids[:, :-further] * (ids.max() + 1) + ids[:, further:])
        length += further
    return ids


def _ranks(values: np.ndarray) -> np.ndarray:
    """The values by 0, 1, 2, ... in their order, int64: never more than there are places."""
    return np.unique(values, return_inverse=True)[1].reshape(values.shape).astype(np.int64)
