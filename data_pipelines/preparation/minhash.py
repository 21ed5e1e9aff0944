"""MinHash: a short signature of a set, from which the Jaccard similarity of two sets is estimated."""

from typing import Literal

import numpy as np

from data_pipelines.preparation.word_hashes import mix
from lfm_jax.configuration import ConfigError

Implementation = Literal["rensa", "numpy"]


def minhash_signatures(
    hashes: np.ndarray, ends: np.ndarray, permutations: int, seed: int, implementation: Implementation
) -> np.ndarray:
    """Signatures of several sets, [sets, permutations] uint32.

    Entry k of a signature is the least value that the k-th hash function takes on the set. Two signatures agree in an entry with
    a probability of the sets' Jaccard similarity J (Broder 1997), so the share of entries that agree estimates J with a standard
    deviation of sqrt(J (1 - J) / permutations).

    Args:
      hashes: uint64, the elements of all sets, one set after the other; an element may be there more than once.
      ends: [sets] int64, where each set ends; none is empty.
      seed: chooses the hash functions. Signatures can be compared where seed and implementation are the same.
      implementation: "rensa" (the package, some thirty times as fast) or "numpy".
    Raises:
      ConfigError: rensa is asked for and not installed.
    """
    if not len(ends):
        return np.zeros((0, permutations), np.uint32)
    return (_rensa if implementation == "rensa" else _numpy)(hashes, ends, permutations, seed)


def agreement(first: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[others] float64: the estimated similarity of each of the signatures [others, permutations] with the first."""
    return (others == first).mean(axis=-1)


def _rensa(hashes: np.ndarray, ends: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    try:
        import rensa
    except ImportError as error:
        raise ConfigError(
            "the package rensa, which makes MinHash signatures, is not installed: pip install rensa, or set "
            "near_duplicates.implementation=numpy, which is slower and gives other signatures, as good"
        ) from error
    offsets = np.concatenate([[0], ends]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.ascontiguousarray(hashes), offsets, permutations, seed)
    return np.array(matrix.to_rows(), np.uint32)


def _numpy(hashes: np.ndarray, ends: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """The k-th hash function: the upper half of mix(x xor c_k), c_k drawn; mix is one to one and near to random."""
    constants = np.random.default_rng(seed).integers(0, 1 << 64, permutations, dtype=np.uint64)
    starts = np.concatenate([[0], ends[:-1]])
    signatures = np.empty((len(ends), permutations), np.uint32)
    for index, constant in enumerate(constants):
        values = (mix(hashes ^ constant) >> np.uint64(32)).astype(np.uint32)
        signatures[:, index] = np.minimum.reduceat(values, starts)
    return signatures
