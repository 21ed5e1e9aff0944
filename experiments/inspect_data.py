"""What training would see of tokenized text: shares of the sources, lengths of documents, packing, and rows to read."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.text import Text

from data_pipelines import LoaderConfig, Tokenizer, TokenShards, pack_shards, training_batches
from experiments.prepared_data import read_tokenized
from experiments.results import write_results
from lfm_jax.configuration import mistakes_in

# Files of a source whose documents' lengths are looked at, spread over all of them.
_MOST_FILES = 64
# Points of the plot of the mixture over the steps.
_MOST_POINTS = 100
_COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """tokens_from: workdirs with tokenized text, one a source; loader: how rows and batches are made of it.

    steps: over which the mixture is shown. samples: rows that are decoded; sample_tokens: how much of each.
    """

    tokens_from: tuple[str, ...]
    loader: LoaderConfig
    steps: int = 1000
    samples: int = 4
    sample_tokens: int = 512

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")


def main(config: Config, workdir: epath.Path) -> None:
    """Writes tables, `lengths.png`, `mixture.png` and `samples.html`, and prints the samples."""
    text = read_tokenized(config.tokens_from, ("train",))
    tokenizer, sources = text.tokenizer, text.train
    with mistakes_in("loader"):
        batches = training_batches(sources, config.loader, tokenizer, process_index=0, process_count=1)
    steps = min(config.steps, len(batches))
    lengths = [_lengths(shards) for shards in sources]
    _plot_lengths(config, lengths, workdir / "lengths.png")
    _plot_mixture(config, batches, steps, workdir / "mixture.png")
    console = Console(record=True, width=120)
    for row in _rows(batches, config.samples):
        console.print(colored(row, tokenizer, config.sample_tokens), soft_wrap=True)
        console.rule()
    (workdir / "samples.html").write_text(console.export_html())
    batches.close()
    of_sources = zip(config.tokens_from, sources, lengths, _rows_given(batches, steps), strict=True)
    figures = {
        "sources": [_source(config, *each) for each in of_sources],
        "steps": steps,
        "tokens": sum(shards.tokens for shards in sources),
        "positions": config.loader.positions(steps),
    }
    write_results(workdir, figures, config)


def _lengths(shards: TokenShards) -> np.ndarray:
    """Ids of each document, of a number of files."""
    files = np.unique(np.linspace(0, len(shards.shards) - 1, _MOST_FILES).round().astype(int))
    return np.concatenate([shards.lengths_of(int(file)) for file in files])


def _rows_given(batches: Any, steps: int) -> list[int]:
    """Rows that each source gives to the first steps, of every length."""
    totals = None
    for shares in (batches.shares(step) for step in range(steps)):
        totals = [share.count + (totals[at] if totals else 0) for at, share in enumerate(shares)]
    return totals


def _source(config: Config, name: str, shards: TokenShards, lengths: np.ndarray, rows: int) -> dict[str, Any]:
    packed = pack_shards(shards, config.loader.seq_len, fill_in_the_middle=config.loader.fill_in_the_middle)
    quartiles = np.percentile(lengths, [25, 50, 75, 99]).round().astype(int).tolist()
    return {
        "source": name, "documents": shards.documents, "tokens": shards.tokens,
        "bytes_per_token": shards.text_bytes / shards.tokens,
        **dict(zip(("length_25", "length_50", "length_75", "length_99"), quartiles, strict=True)),
        "rows": int(packed.rows.sum()), "pad_share": packed.pad_share,
        "longer_than_a_row_share": float(np.mean(lengths + 1 > config.loader.seq_len)),
        "rows_given": rows, "epochs_given": rows / int(packed.rows.sum()),
    }  # fmt: skip


def _rows(batches: Any, samples: int) -> list[dict[str, np.ndarray]]:
    """The first rows of the run, which may have fewer."""
    rows = ({name: array[row] for name, array in batch.items()} for batch in batches for row in range(len(batch["tokens"])))
    return list(itertools.islice(rows, samples))


def colored(row: dict[str, np.ndarray], tokenizer: Tokenizer, most: int) -> Text:
    """A row's targets as text: a color for each document, struck out where they do not count, and marks for special ids."""
    text = Text()
    targets, segments, counts = (row[name][:most] for name in ("targets", "segment_ids", "loss_mask"))
    changes = np.flatnonzero((np.diff(segments) != 0) | (np.diff(counts) != 0)) + 1
    for ids, segment, count in zip(*(np.split(array, changes) for array in (targets, segments, counts)), strict=True):
        style = f"{_COLORS[segment[0] % len(_COLORS)]}" + ("" if count[0] else " strike")
        text.append(tokenizer.decode(ids.tolist()), style)
        if not segment[0]:
            text.append(f"[{len(ids)} of padding]", "dim")
        elif ids[-1] == tokenizer.eos_id:
            text.append("[end]", "bold reverse")
    return text


def _plot_lengths(config: Config, lengths: list[np.ndarray], path: epath.Path) -> None:
    axes, save = _figure("ids of a document", "share of the ids", path)
    bins = np.geomspace(1, max(int(each.max(initial=1)) for each in lengths) + 1, 60)
    for name, each in zip(config.tokens_from, lengths, strict=True):
        axes.hist(np.maximum(each, 1), bins, weights=each / max(1, each.sum()), histtype="step", label=epath.Path(name).name)
    axes.axvline(config.loader.seq_len, color="grey", linestyle=":", label="a row")
    axes.set_xscale("log")
    save()


def _plot_mixture(config: Config, batches: Any, steps: int, path: epath.Path) -> None:
    axes, save = _figure("step", "share of the rows", path)
    edges = np.unique(np.linspace(0, steps, min(_MOST_POINTS, steps) + 1).round().astype(int))
    counts = np.zeros((len(config.tokens_from), len(edges) - 1))
    for at, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        for shares in (batches.shares(step) for step in range(first, last)):
            counts[:, at] += [share.count for share in shares]
    axes.stackplot(edges[:-1], counts / counts.sum(0), labels=[epath.Path(name).name for name in config.tokens_from], step="post")
    axes.set_ylim(0, 1)
    save()


def _figure(x: str, y: str, path: epath.Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)

    def save() -> None:
        axes.legend(framealpha=0.8)
        with path.open("wb") as file:
            figure.savefig(file, format="png", dpi=120)

    return axes, save
