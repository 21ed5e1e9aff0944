"""Contamination: documents that share a run of words with an evaluation set, which a model must not have read."""

import collections
import dataclasses
import io
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from etils import epath

from data_pipelines.preparation.word_hashes import WordHashes, ngram_hashes, plain_words
from data_pipelines.sources.documents import DocumentsConfig, read_documents
from lfm_jax.configuration import ConfigError

_MOST_SETS = 64
# A table of one bit's worth for each value of the upper bits of a hash: nearly all n-grams of a text are turned away by it.
_PREFIX_BITS = 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSetConfig:
    """An evaluation set. name: for the report; source, text_field: as in `DocumentsConfig`, all of it is read."""

    name: str
    source: str
    text_field: str = "text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecontaminationConfig:
    """What is contaminated, and what becomes of it. Brown et al. 2020 (GPT-3), appendix C, whose figures are the defaults.

    The paper cuts the surroundings of the n-gram out of a long document; here the whole document goes, or none ("report").

    evaluation: the sets. ngram_words: length of the runs of words that are compared, in lower case and without punctuation.
    max_documents: an n-gram in more documents than this is taken for a phrase of the language and ignored; None: none is.
    action: "drop" the documents, or keep them and only "report". reported_ngrams: how many of the commonest n-grams are named for
    each set.
    """

    evaluation: tuple[EvaluationSetConfig, ...] = ()
    ngram_words: int = 13
    max_documents: int | None = 10
    action: Literal["drop", "report"] = "drop"
    reported_ngrams: int = 10

    def __post_init__(self):
        if self.ngram_words < 1:
            raise ValueError(f"ngram_words must be positive, got {self.ngram_words}")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents must be positive or None, got {self.max_documents}")
        if self.reported_ngrams < 0:
            raise ValueError(f"reported_ngrams must not be negative, got {self.reported_ngrams}")
        names = [entry.name for entry in self.evaluation]
        twice = sorted(name for name, count in collections.Counter(names).items() if count > 1)
        if twice or len(names) > _MOST_SETS:
            raise ValueError(f"evaluation may have {_MOST_SETS} sets, each of another name; got {len(names)}, twice: {twice}")


class EvaluationNgrams:
    """The n-grams of all evaluation sets, each with a number below `len(hashes)`. Some 50 bytes each, and the words once."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        """arrays: as `collect` makes them."""
        self.arrays = arrays
        self.hashes = arrays["hashes"]
        self.ngram_words = int(arrays["ngram_words"])
        self._known = np.zeros(1 << _PREFIX_BITS, bool)
        self._known[self.hashes >> np.uint64(64 - _PREFIX_BITS)] = True

    @classmethod
    def collect(cls, config: DecontaminationConfig) -> "EvaluationNgrams":
        """Reads the evaluation sets.

        Raises:
          ConfigError: a set, or a record of one, cannot be read.
        """
        hash_words, texts, sets, hashes, places = WordHashes(), [], [], [np.zeros(0, np.uint64)], [np.zeros((0, 2), np.int64)]
        for which, entry in enumerate(config.evaluation):
            source = DocumentsConfig(source=entry.source, text_field=entry.text_field, held_out_share=1.0)
            for text in _texts(source, entry.name):
                words = plain_words(text)
                own, first = np.unique(ngram_hashes(hash_words(words), config.ngram_words), return_index=True)
                hashes.append(own)
                places.append(np.stack([np.full(len(own), len(texts)), first], axis=1))
                sets.append(which)
                texts.append(" ".join(words))
        occurrences, place = np.concatenate(hashes), np.concatenate(places)
        distinct, first, number = np.unique(occurrences, return_index=True, return_inverse=True)
        return cls({
            "hashes": distinct, "ngram_words": np.int64(config.ngram_words), "place": place[first],
            "occurrence_ngram": number.astype(np.int64), "occurrence_document": place[:, 0],
            "document_set": np.array(sets, np.int64), "texts": np.frombuffer("\n".join(texts).encode(), np.uint8),
        })  # fmt: skip

    def save(self, path: epath.Path) -> None:
        """Writes one file."""
        buffer = io.BytesIO()
        np.savez(buffer, **self.arrays)
        path.write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: epath.Path) -> "EvaluationNgrams":
        """Reads what `save` has written."""
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return cls(dict(file))

    def find(self, words: np.ndarray) -> np.ndarray:
        """The numbers of the n-grams that a text shares with the sets, ascending, each once.

        Args:
          words: [words] uint64, hashes of the words of the text.
        """
        ngrams = ngram_hashes(words, self.ngram_words)
        ngrams = np.unique(ngrams[self._known[ngrams >> np.uint64(64 - _PREFIX_BITS)]])
        if not len(ngrams):
            return np.zeros(0, np.int64)
        at = np.minimum(np.searchsorted(self.hashes, ngrams), len(self.hashes) - 1)
        return at[self.hashes[at] == ngrams]

    def text(self, ngram: int) -> str:
        """The words of an n-gram."""
        document, first = self.arrays["place"][ngram]
        words = self.arrays["texts"].tobytes().decode().split("\n")[document].split(" ")
        return " ".join(words[first : first + self.ngram_words])

    def sets_of(self) -> np.ndarray:
        """[n-grams] uint64: in which sets each is, a bit for each."""
        sets = np.zeros(len(self.hashes), np.uint64)
        bits = np.uint64(1) << self.arrays["document_set"][self.arrays["occurrence_document"]].astype(np.uint64)
        np.bitwise_or.at(sets, self.arrays["occurrence_ngram"], bits)
        return sets


def _texts(source: DocumentsConfig, name: str) -> Iterator[str]:
    try:
        yield from (document.text for document in read_documents(source, "held_out"))
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"evaluation set {name!r}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Contamination:
    """documents: [contaminated] int64, ascending. ngrams: [contaminated] int64, how many different n-grams each shares with the
    sets. sets: [contaminated] uint64, with which, a bit for each. report: a mapping for each set."""

    documents: np.ndarray
    ngrams: np.ndarray
    sets: np.ndarray
    report: list[dict[str, Any]]


def find_contamination(hits: np.ndarray, ngrams: EvaluationNgrams, config: DecontaminationConfig) -> Contamination:
    """Which documents are contaminated, and what of the evaluation sets they hold.

    Args:
      hits: [hits, 2] int64, (document, number of an n-gram it has), each pair once, of the documents that are looked at.
    """
    counts = np.bincount(hits[:, 1], minlength=len(ngrams.hashes))
    counted = np.ones(len(counts), bool) if config.max_documents is None else counts <= config.max_documents
    hits = hits[counted[hits[:, 1]]]
    documents, index, number = np.unique(hits[:, 0], return_inverse=True, return_counts=True)
    sets = np.zeros(len(documents), np.uint64)
    np.bitwise_or.at(sets, index, ngrams.sets_of()[hits[:, 1]])
    report = [_report(which, entry.name, hits, counts, ~counted, ngrams, config) for which, entry in enumerate(config.evaluation)]
    return Contamination(documents, number, sets, report)


def _report(
    which: int, name: str, hits: np.ndarray, counts: np.ndarray, ignored: np.ndarray, ngrams: EvaluationNgrams,
    config: DecontaminationConfig,
) -> dict[str, Any]:  # fmt: skip
    """Of one set: its documents, those too short for an n-gram, those touched and by how many, the commonest n-grams."""
    of_set = ngrams.arrays["document_set"] == which
    inside = of_set[ngrams.arrays["occurrence_document"]]
    own = np.zeros(len(ngrams.hashes), bool)
    own[ngrams.arrays["occurrence_ngram"][inside]] = True
    hit = np.zeros(len(ngrams.hashes), bool)
    hit[hits[:, 1]] = True
    touched = ngrams.arrays["occurrence_document"][inside & hit[ngrams.arrays["occurrence_ngram"]]]
    with_ngrams = np.unique(ngrams.arrays["occurrence_document"][inside])
    return {
        "name": name,
        "evaluation_documents": int(of_set.sum()),
        "too_short_to_check": int(of_set.sum() - len(with_ngrams)),
        "evaluation_documents_touched": len(np.unique(touched)),
        "documents": len(np.unique(hits[own[hits[:, 1]], 0])),
        "ngrams": int((own & hit).sum()),
        "commonest_ngrams": _commonest(own & hit, counts, ngrams, config.reported_ngrams),
        "ignored_ngrams": int((own & ignored).sum()),
        "commonest_ignored_ngrams": _commonest(own & ignored, counts, ngrams, config.reported_ngrams),
    }


def _commonest(which: np.ndarray, counts: np.ndarray, ngrams: EvaluationNgrams, most: int) -> list[dict[str, Any]]:
    numbers = np.flatnonzero(which)
    numbers = numbers[np.argsort(-counts[numbers], kind="stable")][:most]
    return [{"text": ngrams.text(number), "documents": int(counts[number])} for number in numbers]
