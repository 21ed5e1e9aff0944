"""Text made ready for a model: a tokenizer, and both splits as token shards, each made once in a workdir."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import jax
from etils import epath
from jax.experimental import multihost_utils

from data_pipelines import (
    Document,
    DocumentsConfig,
    Quarantine,
    TokenizationConfig,
    Tokenizer,
    TokenizerConfig,
    TokenShards,
    check_source,
    last_written,
    load_tokenizer,
    pack_shards,
    read_documents,
    read_token_shards,
    rows_folder,
    tokenize_corpus,
    tokenize_corpus_with_beam,
    train_tokenizer,
)
from experiments.stages import TOKENIZER
from lfm_jax.configuration import mistakes_in

TOKENS = "tokens"
Split = Literal["train", "held_out"]
_TOKENIZATION = TokenizationConfig()
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def prepare_tokenizer(
    workdir: epath.Path,
    data: DocumentsConfig | None,
    training: TokenizerConfig,
    given: str | None,
    tokenization: TokenizationConfig = _TOKENIZATION,
) -> Tokenizer:
    """The tokenizer in the workdir, which is first copied there from `given`, or trained on the training split of `data`.

    Bad records are left out of the training up to the limit of `tokenization`; the workdir's `tokenizer_quarantine.jsonl` lists
    them.

    Raises:
      ConfigError: `given` holds no tokenizer, or one that cannot be used; or the text cannot be read, has too many bad records,
        or gives no tokenizer.
    """
    folder = workdir / TOKENIZER
    with mistakes_in("data" if given is None else "tokenizer_from"):
        if given is None:
            _once(folder, lambda: _train(training, data, folder, tokenization.bad_records_limit))
        else:
            _once(folder, lambda: _copy_tokenizer(epath.Path(given), folder))
        return load_tokenizer(folder)


def _train(training: TokenizerConfig, data: DocumentsConfig, folder: epath.Path, limit: float) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}_quarantine.jsonl"
    train_tokenizer(training, good_documents(data, "train", path, limit), folder)


def good_documents(data: DocumentsConfig, split: Split, path: epath.Path, limit: float) -> Iterator[Document]:
    """The documents of a split. When all are read, the bad records are listed in a file, if there are any.

    Args:
      path: of the file; its folder must exist.
    Raises:
      ValueError: more than the share `limit` of the records is bad, which is said rather than what is wrong for want of them; or
        as `read_documents`.
    """
    with Quarantine(path) as quarantine:
        try:
            yield from read_documents(data, split, quarantine)
        except ValueError:
            quarantine.check(limit)
            raise
        quarantine.check(limit)
    if not quarantine.counts.bad:
        path.unlink()


def prepare_split(
    workdir: epath.Path,
    data: DocumentsConfig,
    split: Split,
    tokenizer: Tokenizer,
    tokenization: TokenizationConfig = _TOKENIZATION,
) -> TokenShards:
    """The token shards of a split in the workdir, made there first, on all cores, if they are not.

    Raises:
      ConfigError: the text cannot be read, or the shards in the workdir are damaged, another tokenizer's or of other text.
    """
    make = lambda folder: tokenize_corpus(data, split, tokenizer, folder, tokenization)
    return _split(workdir, data, split, tokenizer, make)


def prepare_split_with_beam(
    workdir: epath.Path,
    data: DocumentsConfig,
    split: Split,
    tokenizer: Tokenizer,
    tokenization: TokenizationConfig,
    options: Sequence[str],
) -> TokenShards:
    """As `prepare_split`, by Apache Beam, whose workers read the tokenizer that `prepare_tokenizer` has put into the workdir."""
    make = lambda folder: tokenize_corpus_with_beam(data, split, workdir / TOKENIZER, folder, tokenization, options)
    return _split(workdir, data, split, tokenizer, make)


def _split(
    workdir: epath.Path, data: DocumentsConfig, split: Split, tokenizer: Tokenizer, make: Callable[[epath.Path], object]
) -> TokenShards:
    folder = workdir / TOKENS / split
    with mistakes_in("data"):
        _once(last_written(folder), lambda: make(folder))
        shards = read_token_shards(folder, tokenizer)
        check_source(shards, data, split)
        return shards


class PreparedText(NamedTuple):
    """A tokenizer, and of each source its two splits; none of a split that was not read."""

    tokenizer: Tokenizer
    train: list[TokenShards]
    held_out: list[TokenShards]


def read_tokenized(workdirs: Sequence[str], splits: Sequence[Split] = get_args(Split)) -> PreparedText:
    """The text that lies tokenized in workdirs, one for each source, all by the tokenizer of the first.

    Args:
      splits: what is needed of it; another one may be missing.
    Raises:
      ConfigError: there is none in one of them, or another tokenizer's.
    """
    folders = [epath.Path(workdir) for workdir in workdirs]
    with mistakes_in("tokens_from"):
        tokenizer = load_tokenizer(folders[0] / TOKENIZER)
        read = {split: [read_token_shards(folder / TOKENS / split, tokenizer) for folder in folders] for split in splits}
    return PreparedText(tokenizer, *(read.get(split, []) for split in get_args(Split)))


def prepare_rows(shards: TokenShards, seq_len: int, fill_in_the_middle: float = 0.0) -> None:
    """Lets one process pack rows of a length that are not there yet; they stay beside the tokens."""
    make = lambda: pack_shards(shards, seq_len, fill_in_the_middle=fill_in_the_middle)
    _once(last_written(rows_folder(shards, seq_len, fill_in_the_middle)), make)


def _once(path: epath.Path, make: Callable[[], object]) -> None:
    """Lets one process make what is not there yet; `path` is there when all of it is. The others wait."""
    if jax.process_index() == 0 and not path.exists():
        make()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(path))


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
