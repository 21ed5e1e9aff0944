"""Documents made fit to train on: without poor text, duplicates and evaluation sets, and each with its difficulty."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
from etils import epath

from data_pipelines import Document, DocumentsConfig
from data_pipelines.preparation.prepare import DOCUMENTS, REMOVED, PreparationConfig, prepare_documents
from experiments.prepared_data import good_documents
from experiments.results import write_results
from lfm_jax.configuration import ConfigError, mistakes_in, to_mapping

QUARANTINE = "quarantine.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """data: where the documents come from. split: which of them; "all": every one of `data.source`, whatever is said of held-out
    text. steps: what is done to them. bad_records_limit: the share of records that may be unreadable; these are listed in
    `quarantine.jsonl`."""

    data: DocumentsConfig
    split: Literal["all", "train", "held_out"] = "all"
    steps: PreparationConfig = PreparationConfig()
    bad_records_limit: float = 0.001

    def __post_init__(self):
        if not 0 <= self.bad_records_limit <= 1:
            raise ValueError(f"bad_records_limit must be a share from 0 to 1, got {self.bad_records_limit}")


def _documents(config: Config, workdir: epath.Path) -> Iterator[Document]:
    data, split = config.data, config.split
    if split == "all":
        data, split = dataclasses.replace(data, held_out_share=1.0, held_out_source=None), "held_out"
    with mistakes_in("data"):
        yield from good_documents(data, split, workdir / QUARANTINE, config.bad_records_limit)


def main(config: Config, workdir: epath.Path) -> None:
    """Writes documents/, removed.jsonl and quarantine.jsonl, and to results.json what each step kept and removed.

    Raises:
      ConfigError: several processes; or as `prepare_documents`.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"preparation runs in one process, {jax.process_count()} are there: run it by itself, with --config.steps.workers"
        )
    source = {"split": config.split, **to_mapping(config.data)}
    manifest = prepare_documents(lambda: _documents(config, workdir), config.steps, workdir, source)
    first, removed = manifest["steps"][0], {row["step"]: row for row in manifest["steps"]}
    bad = workdir / QUARANTINE
    figures = {
        "bad_records": bad.read_text().count("\n") if bad.exists() else 0,
        "documents_read": first["came_documents"], "text_bytes_read": first["came_bytes"],
        "documents": manifest["documents"], "text_bytes": manifest["text_bytes"], "files": len(manifest["files"]),
        **{f"{step}_removed_documents": row["removed_documents"] for step, row in removed.items()},
        **{f"{step}_removed_bytes": row["removed_bytes"] for step, row in removed.items()},
        "median_difficulty_bits_per_byte": manifest["difficulty_quantiles"].get("0.5"),
        **{name: manifest[name] for name in ("steps", "removed_by_quality_rule", "contamination", "difficulty_quantiles")},
        "documents_folder": DOCUMENTS, "removed_file": REMOVED,
    }  # fmt: skip
    write_results(workdir, figures, config)
