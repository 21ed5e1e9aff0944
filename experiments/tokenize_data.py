"""Text to token shards, on all cores of this machine or on many machines."""

import dataclasses
import time
from typing import Any, Literal

from etils import epath

from data_pipelines import DocumentsConfig, TokenizationConfig, TokenizerConfig
from experiments.prepared_data import prepare_split, prepare_split_with_beam, prepare_tokenizer
from experiments.results import write_results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is tokenized, by what, where.

    data: the text. splits: those that are wanted. tokenizer: is trained on the training split, unless tokenizer_from names a
    file or folder with one. runner: "local": processes on this machine; "beam": Apache Beam, with beam_options as on its command
    line, such as `--runner=DataflowRunner,--region=europe-west4`.
    """

    data: DocumentsConfig
    splits: tuple[Literal["train", "held_out"], ...] = ("train", "held_out")
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokenizer_from: str | None = None
    tokenization: TokenizationConfig = TokenizationConfig()
    runner: Literal["local", "beam"] = "local"
    beam_options: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.splits:
            raise ValueError("splits is empty; name train, held_out or both")
        if self.beam_options and self.runner != "beam":
            raise ValueError(f"beam_options {self.beam_options} say nothing to the runner {self.runner!r}; set runner to beam")


def main(config: Config, workdir: epath.Path) -> None:
    """Makes the tokenizer, then tokens/SPLIT of each split; what is there already is kept."""
    tokenizer = prepare_tokenizer(
        workdir, config.data, config.tokenizer, config.tokenizer_from, config.tokenization
    )
    figures: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    for split in config.splits:
        start = time.monotonic()
        if config.runner == "beam":
            shards = prepare_split_with_beam(workdir, config.data, split, tokenizer, config.tokenization, config.beam_options)
        else:
            shards = prepare_split(workdir, config.data, split, tokenizer, config.tokenization)
        figures |= {
            f"{split}_documents": shards.documents, f"{split}_tokens": shards.tokens, f"{split}_text_bytes": shards.text_bytes,
            f"{split}_shards": len(shards.shards), f"{split}_bad_records": shards.bad_records,
            f"{split}_bytes_per_token": shards.text_bytes / max(1, shards.tokens), f"{split}_seconds": time.monotonic() - start,
        }  # fmt: skip
    write_results(workdir, figures, config)
