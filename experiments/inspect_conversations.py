"""Rows of conversations as training sees them, with what is trained in colour."""

import dataclasses
import itertools

from etils import epath
from rich.console import Console

from data_pipelines import LoaderConfig, TokenizerConfig
from data_pipelines.conversations import PackedConversations, conversation_batches, describe_row
from experiments.conversations import ConversationSources, prepare_conversations, source_figures
from experiments.prepared_data import prepare_tokenizer
from experiments.results import write_results
from experiments.stages import TOKENIZER
from lfm_jax.configuration import mistakes_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: a workdir, a Hugging Face folder or a tokenizer, whose tokenizer and template are used. data: the conversations.

    loader: of the training run. rows: that are shown; tokens: of each that are shown.
    """

    init_from: str
    data: ConversationSources
    loader: LoaderConfig
    rows: int = 4
    tokens: int = 512

    def __post_init__(self):
        if self.rows < 1 or self.tokens < 1:
            raise ValueError(f"rows and tokens must be positive, got {self.rows} and {self.tokens}")


def main(config: Config, workdir: epath.Path) -> None:
    """Prints rows, writes them to rows.html, and counts what is trained, cut and refused."""
    given = epath.Path(config.init_from)
    given = given / TOKENIZER if (given / TOKENIZER).exists() else given
    tokenizer = prepare_tokenizer(workdir, None, TokenizerConfig(), str(given))
    text = prepare_conversations(config.data, workdir, tokenizer, workdir / TOKENIZER)
    with mistakes_in("loader"):
        batches = conversation_batches(text.train, config.loader, tokenizer, process_index=0, process_count=1)
        packed = [PackedConversations(examples, config.loader.seq_len) for examples in text.train]
    console = Console(record=True, width=120)
    wanted = -(-config.rows // config.loader.batch_size)
    rows = (
        {name: array[row] for name, array in batch.items()}
        for batch in itertools.islice(batches, wanted) for row in range(config.loader.batch_size)
    )  # fmt: skip
    for row in itertools.islice(rows, config.rows):
        console.print(describe_row(row, tokenizer, config.tokens), soft_wrap=True)
        console.rule()
    batches.close()
    (workdir / "rows.html").write_text(console.export_html())
    write_results(workdir, source_figures(config.data.names, text.train, packed), config)
