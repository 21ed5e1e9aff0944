"""The whole preparation, pass after pass, each of which the same command finds finished or makes anew."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from data_pipelines.preparation.decisions import STEPS, Decisions, decide, reasons
from data_pipelines.preparation.decontamination import DecontaminationConfig, EvaluationNgrams
from data_pipelines.preparation.difficulty import ByteTrigramModel, DifficultyConfig, sample_texts
from data_pipelines.preparation.near_duplicates import NearDuplicatesConfig
from data_pipelines.preparation.passes import once, same_documents, with_progress
from data_pipelines.preparation.prepared_documents import MANIFEST, Kept, OutputConfig, ordered, record_of, write_prepared
from data_pipelines.preparation.quality import QualityConfig, rules
from data_pipelines.preparation.scan import PART_DOCUMENTS, Measures, Scan, scan_documents
from data_pipelines.sources.documents import Document
from lfm_jax.configuration import ConfigError, flatten, to_mapping

DOCUMENTS = "documents"
REMOVED = "removed.jsonl"
PASSES = "passes"
_SETTINGS = "settings.json"
_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """What is done to documents, in this order; None (for exact_duplicates, false) leaves a step out.

    quality: rules for prose; leave them out for source code. exact_duplicates, near_duplicates: the first of those alike stays.
    decontamination: text of evaluation sets; without a set there is nothing to do. difficulty: a figure for each document, and
    maybe an order. output: the files. workers: processes that measure; 0: the main one. part_documents: so many documents
    are measured before they are safe from a kill.
    """

    quality: QualityConfig | None = QualityConfig()
    exact_duplicates: bool = True
    near_duplicates: NearDuplicatesConfig | None = NearDuplicatesConfig()
    decontamination: DecontaminationConfig | None = DecontaminationConfig()
    difficulty: DifficultyConfig | None = DifficultyConfig()
    output: OutputConfig = OutputConfig()
    workers: int = 0
    part_documents: int = PART_DOCUMENTS

    def __post_init__(self):
        if self.workers < 0 or self.part_documents < 1:
            raise ValueError(
                f"workers must not be negative and part_documents must be positive, got {self.workers} and {self.part_documents}"
            )


def prepare_documents(
    documents: Callable[[], Iterable[Document]], config: PreparationConfig, workdir: epath.Path, source: dict[str, Any]
) -> dict[str, Any]:
    """Reads a source some times over and writes what is worth training on.

    In the workdir appear `documents/` (documents-NNNNN.jsonl.zst with the fields text, name and difficulty, and manifest.json),
    `removed.jsonl` (every removed document, with the step and the reason) and `passes/`, which may be deleted at the end. What is
    written depends on the documents and the settings alone, not on workers or on how often the run was killed. In memory are
    about 110 bytes a document, the n-grams of the evaluation sets (see `EvaluationNgrams`), the difficulty model (0.55 GB while
    it is fitted, and its sample), and a bucket where documents are ordered.

    Args:
      documents: starts to read the source, the same documents each time.
      source: says where they come from, for the manifest.
    Returns:
      The manifest.
    Raises:
      ConfigError: there is no document, the source or the settings are not those of an interrupted run, an evaluation set cannot
        be read, or no document is left.
    """
    passes = workdir / PASSES
    settings = {**to_mapping(config), "source": source}
    settings.pop("workers")
    _check_settings(passes, settings)
    evaluation = _evaluation(config.decontamination, passes)
    measures = Measures(config.near_duplicates, config.quality, evaluation)
    limits = {"workers": config.workers, "part_documents": config.part_documents}
    scan = scan_documents(documents, measures, passes / "scan", **limits)
    once(passes / "decisions", lambda part: _decide(scan, config, evaluation).save(part))
    decisions = Decisions.load(passes / "decisions")
    if decisions.steps.all():
        removed = ", ".join(f"{row['step']} removed {row['removed_documents']}" for row in _counts(scan, decisions))
        raise ConfigError(f"no document is left of {scan.documents}: {removed}; leave out a step, or loosen its limits")
    read = functools.partial(_read, documents, scan, decisions)
    scores = _scores(read, scan, config.difficulty, passes)
    once(workdir / DOCUMENTS, lambda part: _write(read, scan, decisions, scores, config, settings, workdir, part))
    return json.loads((workdir / DOCUMENTS / MANIFEST).read_text())


def _check_settings(passes: epath.Path, settings: dict[str, Any]) -> None:
    """Passes of other settings are not gone on with."""
    path = passes / _SETTINGS
    if not path.exists():
        passes.mkdir(parents=True, exist_ok=True)
        part = passes / f".{_SETTINGS}.part"
        part.write_text(json.dumps(settings, indent=2) + "\n")
        part.rename(path)
    before, now = flatten(json.loads(path.read_text())), flatten(settings)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changed = [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names]
    if changed:
        raise ConfigError(f"{passes} is of other settings: {'; '.join(changed)}; prepare with these in another workdir")


def _evaluation(config: DecontaminationConfig | None, passes: epath.Path) -> EvaluationNgrams | None:
    if config is None or not config.evaluation:
        return None
    once(passes / "evaluation", lambda part: EvaluationNgrams.collect(config).save(part / "ngrams.npz"))
    return EvaluationNgrams.load(passes / "evaluation" / "ngrams.npz")


def _decide(scan: Scan, config: PreparationConfig, evaluation: EvaluationNgrams | None) -> Decisions:
    return decide(
        scan, exact_duplicates=config.exact_duplicates, near_duplicates=config.near_duplicates,
        decontamination=config.decontamination, evaluation=evaluation,
    )  # fmt: skip


def _read(
    documents: Callable[[], Iterable[Document]], scan: Scan, decisions: Decisions, description: str
) -> Iterator[tuple[int, Document]]:
    """(number, document) of those that stay."""
    unchanged = same_documents(with_progress(documents(), description), scan.column("fingerprints"))
    return ((index, document) for index, document in enumerate(unchanged) if not decisions.steps[index])


def _scores(
    read: Callable[[str], Iterator[tuple[int, Document]]], scan: Scan, config: DifficultyConfig | None, passes: epath.Path
) -> np.ndarray | None:
    """[documents] float32, bits per byte; NaN where a document does not stay."""
    if config is None:
        return None

    def fit(part: epath.Path) -> None:
        stay = (document for _, document in read("fitting the difficulty model"))
        ByteTrigramModel.fit(sample_texts(stay, config.sample_bytes)).save(part / "bits.npy")

    def score(part: epath.Path) -> None:
        model = ByteTrigramModel.load(passes / "difficulty_model" / "bits.npy")
        scores = np.full(scan.documents, np.nan, "<f4")
        for index, document in read("rating difficulty"):
            scores[index] = model.bits_per_byte(document.text)
        (part / "scores").write_bytes(scores.tobytes())

    once(passes / "difficulty_model", fit)
    once(passes / "difficulty", score)
    return np.frombuffer((passes / "difficulty" / "scores").read_bytes(), "<f4")


def _write(
    read: Callable[[str], Iterator[tuple[int, Document]]], scan: Scan, decisions: Decisions, scores: np.ndarray | None,
    config: PreparationConfig, settings: dict[str, Any], workdir: epath.Path, part: epath.Path,
) -> None:  # fmt: skip
    removed = workdir / f".{REMOVED}.part"
    with removed.open("w") as file:
        for reason in reasons(scan, decisions, config.quality, config.decontamination):
            file.write(json.dumps(reason) + "\n")
    removed.replace(workdir / REMOVED)
    sizes = scan.column("sizes")

    def kept() -> Iterator[Kept]:
        for index, document in read("writing"):
            yield Kept(index, record_of(document, None if scores is None else scores[index]), int(sizes[index]))

    documents: Iterable[Kept] = kept()
    if config.difficulty and config.difficulty.order:
        documents = ordered(kept, scores, sizes, config.difficulty.bucket_bytes, part)
    about = {
        "steps": _counts(scan, decisions), "removed_by_quality_rule": _by_rule(scan, config.quality),
        "contamination": decisions.report, "difficulty_quantiles": _quantiles(scores), "settings": settings,
    }  # fmt: skip
    write_prepared(documents, part, config.output, about)


def _counts(scan: Scan, decisions: Decisions) -> list[dict[str, Any]]:
    """Documents and bytes of text before, removed by and left by each step."""
    sizes, counts = scan.column("sizes"), []
    left = np.ones(scan.documents, bool)
    for number, step in enumerate(STEPS, start=1):
        removed = decisions.steps == number
        before, left = left, left & ~removed
        counts.append({"step": step} | {
            f"{what}_{name}": total
            for what, which in (("came", before), ("removed", removed), ("kept", left))
            for name, total in (("documents", int(which.sum())), ("bytes", int(sizes[which].sum())))
        })  # fmt: skip
    return counts


def _by_rule(scan: Scan, config: QualityConfig | None) -> dict[str, int]:
    """How many documents each rule removed."""
    if config is None:
        return {}
    names = list(rules(config))
    found = np.bincount(scan.column("rules"), minlength=len(names) + 1)[1:]
    return {name: int(count) for name, count in zip(names, found, strict=True) if count}


def _quantiles(scores: np.ndarray | None) -> dict[str, float]:
    """Bits per byte, by share of the documents that are easier."""
    if scores is None:
        return {}
    values = np.nanquantile(scores.astype(np.float64), _QUANTILES)
    return {f"{share:g}": round(float(value), 4) for share, value in zip(_QUANTILES, values, strict=True)}
