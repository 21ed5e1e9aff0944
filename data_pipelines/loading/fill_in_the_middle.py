"""Documents told as prefix, suffix, middle, so that a model learns to fill gaps (Bavarian et al. 2022, 2207.14255, section 3).

A document [a, b, c] becomes [fim_pre, a, fim_suf, c, fim_mid, b], "PSM" in the paper, cut at two places drawn evenly. The cuts
are between tokens; the paper cuts between characters (its section 3.1), which costs tokenizing the document again.
"""

import numpy as np

SYMBOLS = ("<|fim_pre|>", "<|fim_suf|>", "<|fim_mid|>")


def chosen_documents(lengths: np.ndarray, seq_len: int, share: float, shard: int) -> np.ndarray:
    """[documents] bool: of those that fit into a row of `seq_len` positions with three symbols more, `share`, by chance."""
    if not share:
        return np.zeros(len(lengths), bool)
    drawn = np.random.default_rng([shard, len(SYMBOLS)]).random(len(lengths)) < share
    return drawn & (lengths + len(SYMBOLS) + 1 <= seq_len)


def grown_lengths(lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """[documents] ids of each, symbols included."""
    return lengths + len(SYMBOLS) * chosen


def move_middle(ids: np.ndarray, symbols: tuple[int, int, int], seed: tuple[int, ...]) -> np.ndarray:
    """[length + 3]: the ids with their middle last; the seed decides where they are cut."""
    first, last = np.sort(np.random.default_rng(seed).integers(0, len(ids) + 1, 2))
    prefix, suffix, middle = ([symbol] for symbol in symbols)
    return np.concatenate([prefix, ids[:first], suffix, ids[last:], middle, ids[first:last]])
