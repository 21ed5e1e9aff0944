"""Near duplicates: documents with most of their word sequences in common, found by MinHash and locality-sensitive hashing."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from scipy import integrate

from data_pipelines.preparation.minhash import Implementation, agreement, minhash_signatures
from data_pipelines.preparation.word_hashes import mix, ngram_hashes

# A missed duplicate stays in the text for good; a candidate too many costs one comparison. Hence the weights of the two.
_MISS_WEIGHT, _FALSE_WEIGHT = 0.9, 0.1
# Documents of one bucket that are compared with all others of it, as long as the bucket is not one cluster: bounds the work on
# thousands of documents that share a form and little else.
_MOST_LEADERS = 64
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicatesConfig:
    """When a document is a near duplicate of an earlier one.

    threshold: least estimated Jaccard similarity of the two sets of word sequences. ngram_words: words of a sequence.
    permutations: length of a signature. seed: of its hash functions. implementation: what computes it, see `minhash_signatures`;
    the two give other signatures, so this is chosen, and not whatever happens to be installed.
    """

    threshold: float = 0.8
    ngram_words: int = 5
    permutations: int = 128
    seed: int = 0
    implementation: Implementation = "rensa"

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        if self.ngram_words < 1 or self.permutations < 1:
            raise ValueError(f"ngram_words and permutations must be positive, got {self.ngram_words} and {self.permutations}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def bands(self) -> tuple[int, int]:
        """(number of bands, entries of each), see `choose_bands`."""
        return choose_bands(self.threshold, self.permutations)


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """1 - (1 - s^r)^b: the chance that two sets of similarity s agree in all r entries of at least one of b bands.

    Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, section 3.4.2.
    """
    return 1 - (1 - similarity**rows) ** bands


@functools.cache
def choose_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands b, rows r), b r <= permutations, that go with a threshold t.

    Of all pairs the one that makes 0.9 times the area above the curve of `candidate_probability` from t to 1 (duplicates that are
    missed) plus 0.1 times the area below it from 0 to t (pairs compared in vain) least, as in the package datasketch.
    """

    def cost(bands: int, rows: int) -> float:
        below, _ = integrate.quad(candidate_probability, 0, threshold, (bands, rows))
        above, _ = integrate.quad(lambda similarity: 1 - candidate_probability(similarity, bands, rows), threshold, 1)
        return _MISS_WEIGHT * above + _FALSE_WEIGHT * below

    pairs = ((bands, rows) for bands in range(1, permutations + 1) for rows in range(1, permutations // bands + 1))
    return min(pairs, key=lambda pair: cost(*pair))


def signatures_of(words: list[np.ndarray], digests: np.ndarray, config: NearDuplicatesConfig) -> np.ndarray:
    """Signatures of documents, [documents, permutations] uint32.

    Args:
      words: for each document the hashes of its words. One with fewer than `ngram_words` has one sequence, of all its words.
      digests: [documents, 2] uint64, see `text_digest`: stand for the words of a document that has none.
    """
    sets = []
    for own, digest in zip(words, digests, strict=True):
        sequences = ngram_hashes(own, max(1, min(config.ngram_words, len(own))))
        sets.append(sequences if len(sequences) else digest[:1])
    ends = np.cumsum([len(sequences) for sequences in sets], dtype=np.int64)
    hashes = np.concatenate(sets) if sets else np.zeros(0, np.uint64)
    return minhash_signatures(hashes, ends, config.permutations, config.seed, config.implementation)


def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """[bands, documents] uint64: the entries of each band as one number."""
    entries = signatures[:, : bands * rows].astype(np.uint64).reshape(len(signatures), bands, rows)
    keys = np.zeros(entries.shape[:2], np.uint64)
    for row in range(rows):
        keys = mix(keys * _FACTOR + entries[:, :, row] + np.uint64(row + 1))
    return keys.T


class Clusters(NamedTuple):
    """kept: [documents] int64, the first document of each document's cluster. similarity: [documents] float32, estimated, of the
    two."""

    kept: np.ndarray
    similarity: np.ndarray


def find_clusters(
    documents: np.ndarray,
    total: int,
    keys: Iterable[np.ndarray],
    signatures: Callable[[np.ndarray], np.ndarray],
    threshold: float,
) -> Clusters:
    """Clusters of near duplicates: documents linked through pairs whose signatures agree in a share of at least the threshold.

    Compared are documents with the same key in a band, so a pair of similarity s is found with `candidate_probability`, if its
    estimate is high enough. Linking pairs is what Lee et al. 2022 (Deduplicating Training Data, section 4.2) do; the ends of a
    chain may be less similar than the threshold, and the similarity given is that with the document kept, whatever it is.

    Args:
      documents: [chosen] int64, ascending: those looked at. The others stand alone.
      total: number of all documents.
      keys: for each band, [total] uint64; one is in memory at a time. Beside it some 75 bytes a document are needed.
      signatures: gives the rows [n, permutations] of n documents.
    """
    parents = np.arange(total)
    for band in keys:
        for bucket in _buckets(documents, band[documents]):
            _link(bucket, parents, signatures, threshold)
    kept = np.fromiter((_root(parents, document) for document in range(total)), np.int64, total)
    similarity = np.ones(total, np.float32)
    for document in np.flatnonzero(kept != np.arange(total)):
        similarity[document] = agreement(*signatures(np.array([kept[document], document])))
    return Clusters(kept, similarity)


def _buckets(documents: np.ndarray, keys: np.ndarray) -> Iterator[np.ndarray]:
    """The documents that share a key, ascending, two or more at a time."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(keys) else np.zeros(0, np.int64)
    ends = np.append(starts[1:], len(keys))
    for which in np.flatnonzero(ends - starts > 1):
        yield documents[order[starts[which] : ends[which]]]


def _link(bucket: np.ndarray, parents: np.ndarray, signatures: Callable[[np.ndarray], np.ndarray], threshold: float) -> None:
    """Joins the clusters of similar documents of a bucket. Pairs that are in one cluster already are not compared."""
    for position, leader in enumerate(bucket[: min(len(bucket) - 1, _MOST_LEADERS)]):
        roots = np.array([_root(parents, document) for document in bucket])
        if (roots == roots[0]).all():
            return
        others = bucket[position + 1 :][roots[position + 1 :] != roots[position]]
        if not len(others):
            continue
        rows = signatures(np.append(leader, others))
        for other in others[agreement(rows[0], rows[1:]) >= threshold]:
            first, second = sorted((_root(parents, leader), _root(parents, other)))
            parents[second] = first


def _root(parents: np.ndarray, document: int) -> int:
    """The first document of the cluster; shortens the way there."""
    while parents[document] != document:
        parents[document] = parents[parents[document]]
        document = parents[document]
    return int(document)
