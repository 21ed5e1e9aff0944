"""Text made ready for a model: a tokenizer, and both splits as token shards, each made once in a workdir."""

from collections.abc import Callable

import jax
from etils import epath
from jax.experimental import multihost_utils

from data_pipelines import (
    DocumentsConfig,
    Tokenizer,
    TokenizerConfig,
    TokenShards,
    load_tokenizer,
    read_documents,
    read_token_shards,
    train_tokenizer,
    write_token_shards,
)
from experiments.stages import TOKENIZER
from lfm_jax.configuration import mistakes_in

TOKENS = "tokens"
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def prepare_tokenizer(workdir: epath.Path, data: DocumentsConfig, training: TokenizerConfig, given: str | None) -> Tokenizer:
    """The tokenizer in the workdir, which is first copied there from `given`, or trained on the training split.

    Raises:
      ConfigError: `given` holds no tokenizer, or one that cannot be used; or the text cannot be read, or gives no tokenizer.
    """
    folder = workdir / TOKENIZER
    with mistakes_in("data" if given is None else "tokenizer_from"):
        if given is None:
            _once(folder, lambda: train_tokenizer(training, read_documents(data, "train"), folder))
        else:
            _once(folder, lambda: _copy_tokenizer(epath.Path(given), folder))
        return load_tokenizer(folder)


def prepare_split(workdir: epath.Path, data: DocumentsConfig, split: str, tokenizer: Tokenizer) -> TokenShards:
    """The token shards of a split ("train" or "held_out") in the workdir, made there first if they are not.

    Raises:
      ConfigError: the text cannot be read, or the shards in the workdir are damaged or another tokenizer's.
    """
    folder = workdir / TOKENS / split
    with mistakes_in("data"):
        _once(folder, lambda: write_token_shards(read_documents(data, split), tokenizer, folder))
        return read_token_shards(folder, tokenizer)


def _once(folder: epath.Path, make: Callable[[], object]) -> None:
    """Lets one process make what is not there yet; what makes it lets it appear whole. The others wait."""
    if jax.process_index() == 0 and not folder.exists():
        make()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(folder))


def _copy_tokenizer(source: epath.Path, folder: epath.Path) -> None:
    files = [source / name for name in _TOKENIZER_FILES if (source / name).exists()] if source.is_dir() else [source]
    if not any(file.name in _TOKENIZER_FILES[:2] and file.exists() for file in files):
        raise FileNotFoundError(f"{source} holds no tokenizer; expected {' or '.join(_TOKENIZER_FILES[:2])}")
    part = folder.parent / f".{folder.name}"
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    for file in files:
        file.copy(part / file.name)
    part.rename(folder)
