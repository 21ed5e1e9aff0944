"""The second step: what becomes of each document, decided from what the first pass has measured."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from data_pipelines.preparation.decontamination import (
    Contamination,
    DecontaminationConfig,
    EvaluationNgrams,
    find_contamination,
)
from data_pipelines.preparation.exact_duplicates import first_of_equal
from data_pipelines.preparation.near_duplicates import NearDuplicatesConfig, find_clusters
from data_pipelines.preparation.quality import QualityConfig, rules
from data_pipelines.preparation.scan import Scan

# In the order in which they are taken. Quality first: of two documents alike, the one that is kept must not be removed later.
# Contamination last: how many documents an n-gram is in shall not count copies.
STEPS = ("quality", "exact_duplicates", "near_duplicates", "decontamination")
_REPORT = "report.json"
_COLUMNS = {"steps": "<u1", "kept": "<i8", "similarity": "<f4", "contaminated": "<i8", "ngrams": "<i8", "sets": "<u8"}


@dataclasses.dataclass(frozen=True)
class Decisions:
    """What becomes of each document.

    steps: [documents] uint8, 0: it stays, else the number, from 1, of the one of `STEPS` that removes it.
    kept: [documents] int64, of a duplicate the first document of its kind. similarity: [documents] float32, to that, estimated.
    contaminated: [n] int64, documents that share n-grams with an evaluation set, ascending. ngrams: [n] int64, how many.
    sets: [n] uint64, a bit for each set. report: of contamination, for each set; see `find_contamination`.
    """

    steps: np.ndarray
    kept: np.ndarray
    similarity: np.ndarray
    contaminated: np.ndarray
    ngrams: np.ndarray
    sets: np.ndarray
    report: list[dict[str, Any]]

    def save(self, folder: epath.Path) -> None:
        """Writes a file for each field into the folder."""
        for name, kind in _COLUMNS.items():
            (folder / name).write_bytes(np.ascontiguousarray(getattr(self, name), kind).tobytes())
        (folder / _REPORT).write_text(json.dumps(self.report, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: epath.Path) -> "Decisions":
        """Reads what `save` has written."""
        columns = {name: np.frombuffer((folder / name).read_bytes(), kind) for name, kind in _COLUMNS.items()}
        return cls(**columns, report=json.loads((folder / _REPORT).read_text()))


def decide(
    scan: Scan,
    *,
    exact_duplicates: bool,
    near_duplicates: NearDuplicatesConfig | None,
    decontamination: DecontaminationConfig | None,
    evaluation: EvaluationNgrams | None,
) -> Decisions:
    """Takes the steps one after the other, each on the documents that those before it have left.

    About 110 bytes a document are in memory, and 16 for each n-gram that a document shares with an evaluation set.
    """
    steps = (scan.column("rules") > 0).astype(np.uint8)
    kept = np.arange(scan.documents)
    similarity = np.ones(scan.documents, np.float32)
    if exact_duplicates:
        left = np.flatnonzero(steps == 0)
        firsts = left[first_of_equal(scan.column("digests")[left])]
        _remove(left, firsts, "exact_duplicates", steps, kept)
    if near_duplicates:
        bands, _ = near_duplicates.bands
        left = np.flatnonzero(steps == 0)
        keys = (scan.band(index) for index in range(bands))
        clusters = find_clusters(left, scan.documents, keys, scan.signatures, near_duplicates.threshold)
        _remove(left, clusters.kept[left], "near_duplicates", steps, kept)
        similarity = clusters.similarity
    nothing = np.zeros(0, np.int64)
    contamination = Contamination(nothing, nothing, nothing.astype(np.uint64), [])
    if decontamination and evaluation:
        hits = [hits[steps[hits[:, 0]] == 0] for hits in scan.hits()]
        contamination = find_contamination(np.concatenate(hits), evaluation, decontamination)
        if decontamination.action == "drop":
            steps[contamination.documents] = STEPS.index("decontamination") + 1
    return Decisions(
        steps, kept, similarity, contamination.documents, contamination.ngrams, contamination.sets, contamination.report
    )


def _remove(left: np.ndarray, firsts: np.ndarray, step: str, steps: np.ndarray, kept: np.ndarray) -> None:
    """Removes those of the documents that are not the first of theirs."""
    gone = firsts != left
    steps[left[gone]] = STEPS.index(step) + 1
    kept[left[gone]] = firsts[gone]


def reasons(
    scan: Scan, decisions: Decisions, quality: QualityConfig | None, decontamination: DecontaminationConfig | None
) -> Iterator[dict[str, Any]]:
    """For each removed document, in order: name, step, reason, and what else there is to say."""
    limits = list(rules(quality).values()) if quality else []
    broken, values = scan.column("rules"), scan.column("values")
    for document in np.flatnonzero(decisions.steps):
        step = STEPS[decisions.steps[document] - 1]
        about: dict[str, Any] = {"name": scan.name(document), "step": step}
        if step == "quality":
            rule, value = limits[broken[document] - 1], float(values[document])
            about |= {"reason": rule.describe(value), "rule": rule.name, "value": round(value, 4)}
        elif step == "decontamination":
            about |= _contamination_of(document, decisions, decontamination)
        else:
            alike = float(decisions.similarity[document])
            other = scan.name(decisions.kept[document])
            words = "the same text as" if step == "exact_duplicates" else f"about {alike:.2f} similar to"
            about |= {"reason": f"{words} {other}", "duplicate_of": other, "similarity": round(alike, 4)}
        yield about


def _contamination_of(document: int, decisions: Decisions, config: DecontaminationConfig) -> dict[str, Any]:
    at = np.searchsorted(decisions.contaminated, document)
    bits, count = int(decisions.sets[at]), int(decisions.ngrams[at])
    names = [entry.name for which, entry in enumerate(config.evaluation) if bits >> which & 1]
    reason = f"shares {count} different runs of {config.ngram_words} words with {', '.join(names)}"
    return {"reason": reason, "evaluation_sets": names, "ngrams": count}
