"""The text of a sweep: token shards of the source whose entropy is known, and what the best possible loss on them is."""

import json
import math
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from rich.progress import track

from data_pipelines import Tokenizer, load_tokenizer
from data_pipelines.sources.known_entropy import KnownEntropyConfig, KnownEntropySource
from data_pipelines.tokenization.shard_writer import ShardWriter, describe_tokenizer, part_of, publish, write_index
from data_pipelines.tokenization.token_shards import read_token_shards
from data_pipelines.tokenization.tokenizer import JSON_FILE, SYMBOLS
from experiments.prepared_data import TOKENS, prepare_rows
from experiments.results import write_json
from experiments.stages import TOKENIZER
from lfm_jax.configuration import ConfigError, to_mapping

FOLDER = "text"
VOCAB_SIZE = 256
_ABOUT = "source.json"
_SPECIAL = SYMBOLS[:3]  # padding, beginning and end: ids 0 to 2
_FIRST_CHARACTER = 0x100  # of the symbol with id 0; all are letters, of two bytes each in UTF-8
_BYTES = 2
# A call that reads documents takes longer the more of them the file has, 1 ms with 0.1 million and 90 with 6 million of them.
_SHARD_TOKENS = 1 << 21
_SEEDS = {"train": 1, "held_out": 2}


class Known(NamedTuple):
    """The least loss on the held-out text, in nats a token.

    log_loss: of the source itself on it: what a perfect model would measure. entropy: of the source, the mean over the same
    places of what could have come, with its standard error over documents.
    """

    log_loss: float
    entropy: float
    entropy_error: float


def prepare_text(workdir: epath.Path, source: KnownEntropyConfig, tokens: dict[str, int], seq_len: int) -> Known:
    """Writes both splits, their rows and the tokenizer to workdir/text, unless they are there, as a stage that others read.

    Args:
      source: its documents fit into a row. tokens: symbols of "train" and "held_out".

    Raises:
      ConfigError: the text that is there is another one, or documents do not fit into a row.
    """
    if source.longest >= seq_len:
        raise ConfigError(
            f"--config.source.longest={source.longest} symbols and the beginning do not fit into rows of {seq_len}, and of a "
            "document that is cut the entropy is not known; lower it, or raise loader.seq_len"
        )
    if source.first_id < len(_SPECIAL):
        raise ConfigError(f"--config.source.first_id={source.first_id}: ids 0 to {len(_SPECIAL) - 1} are the tokenizer's symbols")
    folder = workdir / FOLDER
    about = json.loads(json.dumps({"source": to_mapping(source), "tokens": tokens}))
    if not (folder / _ABOUT).exists():
        tokenizer = _write_tokenizer(folder / TOKENIZER)
        known = KnownEntropySource(source)
        for split, count in tokens.items():
            _write_split(folder / TOKENS / split, known, tokenizer, _SEEDS[split], count)
            prepare_rows(read_token_shards(folder / TOKENS / split, tokenizer), seq_len)
        write_json(folder / _ABOUT, about | {"known": _known(known, tokens["held_out"])._asdict()})
    found = json.loads((folder / _ABOUT).read_text())
    least = found.pop("known")
    if found != about:
        raise ConfigError(f"{folder} holds another text, {found}, than is asked for, {about}; take another --workdir")
    return Known(**least)


def _known(source: KnownEntropySource, held_out: int) -> Known:
    sums = []
    for document in track(list(source.documents(_SEEDS["held_out"], held_out)), "entropy", transient=True):
        certainty = source.certainty([document])
        sums.append((certainty.log_loss.sum(), certainty.entropy.sum(), len(document) + 1))
    log_loss, entropy, targets = np.array(sums).T
    mean = entropy.sum() / targets.sum()
    error = math.sqrt(((entropy - mean * targets) ** 2).sum()) / targets.sum()  # of a ratio of sums
    return Known(float(log_loss.sum() / targets.sum()), float(mean), error)


def _write_split(folder: epath.Path, source: KnownEntropySource, tokenizer: Tokenizer, seed: int, tokens: int) -> None:
    if folder.exists():
        return
    part = part_of(folder)
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    with ShardWriter(part, 0, tokenizer, _SHARD_TOKENS) as writer:
        for document in track(source.documents(seed, tokens), f"{folder.name}: documents", total=None, transient=True):
            writer.add(document, _BYTES * len(document))
        counts = writer.finish()
    about: dict[str, Any] = {"tokenizer": describe_tokenizer(tokenizer), "shard_tokens": _SHARD_TOKENS}
    write_index(part, about, {**counts, "records": {"seen": counts["documents"], "bad": {}}})
    publish(part, folder)


def _write_tokenizer(folder: epath.Path) -> Tokenizer:
    """A letter for each id beside the three special ones."""
    if not folder.exists():
        import tokenizers

        letters = {chr(_FIRST_CHARACTER + index): index for index in range(len(_SPECIAL), VOCAB_SIZE)}
        special = {symbol: index for index, symbol in enumerate(_SPECIAL)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=special | letters, merges=[]))
        tokenizer.decoder = tokenizers.decoders.Fuse()
        tokenizer.add_special_tokens([tokenizers.AddedToken(symbol, special=True) for symbol in _SPECIAL])
        part = part_of(folder)
        part.mkdir(parents=True, exist_ok=True)
        (part / JSON_FILE).write_text(tokenizer.to_str())
        part.rename(folder)
    return load_tokenizer(folder)
