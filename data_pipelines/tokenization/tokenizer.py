"""Tokenizers: trained here with SentencePiece, or read from a SentencePiece model or a tokenizer.json."""

import abc
import concurrent.futures
import dataclasses
import hashlib
import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
import tokenizers
from etils import epath

from data_pipelines.sources.documents import Document
from lfm_jax.interop.tokenizer_json import check_pieces, read_tokenizer_json

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
# The symbols of the LFM2 chat format, at their ids.
SYMBOLS = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>", "<|im_end|>",
    "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>",
    "<|tool_response_end|>",
)  # fmt: skip
_PAD, _BOS, _EOS = SYMBOLS[:3]
_LEAST_IDS = len(SYMBOLS) + 1 + 256  # and the unknown symbol and the bytes
_MOST_IDS = 1 << 24
# SentencePiece writes a space as this, and so reads this as a space.
_SPACE = "\u2581"
# SentencePiece trains on "sentences": here pieces of documents that end with a line, so that breaks of lines become part of
# tokens, and that are small beside what is trained on, so that a sample of them is a fair one.
_CHUNK_CHARACTERS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer that is trained on the documents.

    vocab_size: number of ids, special symbols and the 256 bytes included.
    train_bytes: how much text (UTF-8) it is trained on; of more, a random sample of parts of documents is taken.
    seed: of that sample.
    """

    vocab_size: int = 4096
    train_bytes: int = 1 << 24
    seed: int = 0

    def __post_init__(self):
        if not _LEAST_IDS < self.vocab_size <= _MOST_IDS:
            raise ValueError(
                f"vocab_size must be more than {_LEAST_IDS} (special symbols and bytes) and at most {_MOST_IDS}, got "
                f"{self.vocab_size}"
            )
        if self.train_bytes < 1:
            raise ValueError(f"train_bytes must be positive, got {self.train_bytes}")


class Tokenizer(abc.ABC):
    """Text to ids and back.

    vocab_size: number of ids, all below it. bos_id, eos_id, pad_id: beginning of text, end of text, padding; `encode` gives none
    of them. fingerprint: SHA-256 of the tokenizer's file: ids mean the same where it is the same.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it stands: the spelling of a special symbol is text as well."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, in as many threads (None: one for each core); Python's lock is not held meanwhile."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special symbols have none."""

    def symbol_id(self, symbol: str) -> int:
        """The id of a special symbol other than the usual three, such as <|fim_pre|>.

        Raises:
          ValueError: the tokenizer has no such symbol.
        """
        index = self._find_symbol(symbol)
        if index is None:
            raise ValueError(f"the tokenizer has no symbol {symbol}; take one that has (those that are trained here do)")
        return index

    @abc.abstractmethod
    def _find_symbol(self, symbol: str) -> int | None:
        """The id of a special symbol; None: there is none."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, content: bytes, name: str):
        """content: of the model's file; name: of the file, for messages. Raises ValueError if it cannot be used."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, UnicodeDecodeError) as error:  # the second: of a message that quotes what is no text
            raise ValueError(f"{name} is no SentencePiece model: {error}") from error
        self.vocab_size = self._processor.get_piece_size()
        check_pieces(self._processor, name)
        self.bos_id, self.eos_id, self.pad_id = (
            self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()
        )  # fmt: skip
        _check_special({"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}, name)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """As in `Tokenizer`. SentencePiece's own mark of a space, in a text, is spelled in bytes, or it would become a space."""
        if not any(_SPACE in text for text in texts):
            return self._processor.encode(list(texts), num_threads=threads or -1)
        return [self._join(self._processor.encode(text.split(_SPACE), num_threads=threads or -1)) for text in texts]

    def _join(self, parts: list[list[int]]) -> list[int]:
        return parts[0] + [index for part in parts[1:] for index in (*self._space, *part)]

    def decode(self, ids: Sequence[int]) -> str:
        """As in `Tokenizer`."""
        return self._processor.decode([int(index) for index in ids])

    def _find_symbol(self, symbol: str) -> int | None:
        index = self._processor.piece_to_id(symbol)
        return index if self._processor.is_control(index) else None


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. Special symbols spelled in a text are text; added tokens that are not special are found in it."""

    def __init__(self, content: bytes, name: str):
        """content: of tokenizer.json; name: of the file, for messages. Raises ValueError if it cannot be used."""
        self._content, self._name = content, name
        self.vocab_size = read_tokenizer_json(content, name)
        self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        special = [self._tokenizer.token_to_id(token) for token in (_BOS, _EOS, _PAD)]
        _check_special(dict(zip((_BOS, _EOS, _PAD), special, strict=True)), name)
        self.bos_id, self.eos_id, self.pad_id = special
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew from the file: the package's own pickle forgets `encode_special_tokens`."""
        return HuggingFaceTokenizer, (self._content, self._name)

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """As in `Tokenizer`; with None, the number is the package's to choose (TOKENIZERS_PARALLELISM, RAYON_NUM_THREADS)."""
        if threads is None:
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        if threads == 1:
            return [self._encode_one(text) for text in texts]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode_one, texts))

    def _encode_one(self, text: str) -> list[int]:
        """A batch of one: the package keeps it in one thread, and, other than for a text by itself, lets go of Python's lock."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """As in `Tokenizer`."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)

    def _find_symbol(self, symbol: str) -> int | None:
        return self._tokenizer.token_to_id(symbol)


def _check_special(ids: dict[str, int | None], name: str) -> None:
    missing = [token for token, index in ids.items() if index is None or index < 0]
    if missing:
        raise ValueError(
            f"{name} has no id for {', '.join(missing)}; expected symbols for the beginning and the end of a text and for "
            f"padding ({_BOS}, {_EOS}, {_PAD})"
        )


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """Reads a tokenizer.model (SentencePiece) or a tokenizer.json (Hugging Face), or the first of the two in a folder.

    Raises:
      FileNotFoundError: there is neither.
      ValueError: a damaged file, or a tokenizer without the special symbols.
    """
    path = epath.Path(path)
    file = path
    if path.is_dir():
        file = next((path / name for name in (MODEL_FILE, JSON_FILE) if (path / name).exists()), path / MODEL_FILE)
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no tokenizer; expected {MODEL_FILE} or {JSON_FILE}")
    kind = HuggingFaceTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    return kind(file.read_bytes(), str(file))


def train_tokenizer(config: TokenizerConfig, documents: Iterable[Document], folder: epath.PathLike) -> Tokenizer:
    """Trains a byte-pair encoding on the documents and writes it as `folder`/tokenizer.model; the folder appears whole.

    Text comes back from its ids character by character: no normalisation, and what has no piece is spelled in bytes. The same
    documents and configuration give the same file. Kudo & Richardson 2018 (SentencePiece); Sennrich et al. 2016 (BPE).

    Raises:
      FileExistsError: the folder is there already.
      ValueError: too little text for so many ids, or too many different characters for so few.
    """
    folder = epath.Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; load the tokenizer from it, or delete it to train another")
    content = _train(config, _sample(documents, config.train_bytes, config.seed))
    tokenizer = SentencePieceTokenizer(content, str(folder / MODEL_FILE))
    part = folder.parent / f".{folder.name}.part"
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    (part / MODEL_FILE).write_bytes(content)
    part.rename(folder)
    return tokenizer


def _train(config: TokenizerConfig, sentences: list[str]) -> bytes:
    if not sentences:
        raise ValueError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=config.vocab_size,
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, pad_id=0, bos_id=1, eos_id=2, unk_id=len(SYMBOLS),
            pad_piece=_PAD, bos_piece=_BOS, eos_piece=_EOS, control_symbols=list(SYMBOLS[3:]), num_threads=1, minloglevel=2,
            max_sentence_length=8 * _CHUNK_CHARACTERS,
        )  # fmt: skip
    except RuntimeError as error:
        if most := re.search(r"Please set it to a value <= (\d+)", str(error)):
            raise ValueError(
                f"the text is too small for {config.vocab_size} ids: it has pieces for {most[1]}; lower the tokenizer's "
                "vocab_size, or give more text"
            ) from error
        if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"the text has too many different characters for {config.vocab_size} ids: they need {least[1]}; raise the "
                "tokenizer's vocab_size"
            ) from error
        raise
    return model.getvalue()


def _sample(documents: Iterable[Document], most_bytes: int, seed: int) -> list[str]:
    """Parts of the documents, in their order, of at most about `most_bytes` in all: every part has the same chance."""
    draws = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap: the part with the least luck is the next to go
    kept_bytes = 0
    for order, part in enumerate(part for document in documents for part in _parts(document.text)):
        heapq.heappush(kept, (draws.random(), order, part))
        kept_bytes += len(part.encode())
        while kept_bytes > most_bytes and len(kept) > 1:
            kept_bytes -= len(heapq.heappop(kept)[2].encode())
    return [part for _, _, part in sorted(kept, key=lambda entry: entry[1])]


def _parts(text: str) -> Iterator[str]:
    """The text in pieces that end with a line, of one to two times `_CHUNK_CHARACTERS`; a longer line is cut."""
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + _CHUNK_CHARACTERS - 1, start + 2 * _CHUNK_CHARACTERS)
        end = start + 2 * _CHUNK_CHARACTERS if line_end < 0 else line_end + 1
        yield text[start:end]
        start = end
