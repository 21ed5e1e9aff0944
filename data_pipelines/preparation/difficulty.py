"""How hard a document is to predict: its bits per byte under a small model of the corpus itself."""

import dataclasses
import hashlib
import heapq
import io
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from data_pipelines.sources.documents import Document

_BYTES = 256
# A document is preceded by a blank line, so that its first byte has two before it.
_BEFORE = b"\n\n"
_CHUNK_BYTES = 1 << 22
_SAMPLE_CHARACTERS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifficultyConfig:
    """How documents are rated, and whether they are ordered by it.

    sample_bytes: how much of the text (UTF-8) the model is fitted on; of more, a random sample of parts of documents is taken.
    order: whether documents are written from the easiest to the hardest, and not in the order of the source.
    bucket_bytes: of text that is sorted at a time; some three times as much is in memory then.
    """

    sample_bytes: int = 1 << 26
    order: bool = False
    bucket_bytes: int = 1 << 28

    def __post_init__(self):
        if self.sample_bytes < 1 or self.bucket_bytes < 1:
            raise ValueError(f"sample_bytes and bucket_bytes must be positive, got {self.sample_bytes} and {self.bucket_bytes}")


class ByteTrigramModel:
    """Probabilities of a byte after the two before it: a table of 64 MB.

    Discounted counts interpolated with the next lower order, as in `data_pipelines.ngram_baseline` (Chen & Goodman 1998, equation
    17, after Ney, Essen & Kneser 1994), down to 1/256 for each byte. A compressor would do as well, but its bits per byte fall
    with the length of a document, and change with its version; these do neither, and are looked up at over 100 MB a second.
    """

    def __init__(self, bits: np.ndarray):
        """bits: [256, 256, 256] float32, -log2 of the probability of the last byte."""
        self.bits = bits

    @classmethod
    def fit(cls, texts: Iterable[str]) -> "ByteTrigramModel":
        """Counts the bytes of the texts. 540 MB are in memory meanwhile."""
        counts = np.zeros(_BYTES**3, np.int64)
        for codes in map(_codes, texts):
            np.add.at(counts, codes, 1)
        lower = np.full(_BYTES, 1 / _BYTES, np.float32)
        for order in (1, 2, 3):
            lower = _interpolated(counts.reshape((-1,) + (_BYTES,) * order).sum(axis=0), lower)
        return cls(-np.log2(lower))

    def bits_per_byte(self, text: str) -> float:
        """Mean bits of the text's bytes; the text is not empty."""
        content = text.encode()
        starts = range(0, len(content), _CHUNK_BYTES)
        total = sum(self.bits.reshape(-1)[_codes_of(_before(content, at), content[at : at + _CHUNK_BYTES])].sum(dtype=np.float64)
                    for at in starts)  # fmt: skip
        return float(total) / len(content)

    def save(self, path: epath.Path) -> None:
        """Writes one file."""
        buffer = io.BytesIO()
        np.save(buffer, self.bits)
        path.write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: epath.Path) -> "ByteTrigramModel":
        """Reads what `save` has written."""
        return cls(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))


def sample_texts(documents: Iterable[Document], most_bytes: int) -> Iterator[str]:
    """Parts of the documents, of at most about `most_bytes` in all, every part with the same chance.

    Which ones is decided by hashes of the documents' names: the same documents give the same parts.
    """
    kept: list[tuple[int, int, str]] = []  # a heap: the part with the least luck is the next to go
    kept_bytes = 0
    for number, (luck, part) in enumerate(_parts(documents)):
        heapq.heappush(kept, (luck, number, part))
        kept_bytes += len(part.encode())
        while kept_bytes > most_bytes and len(kept) > 1:
            kept_bytes -= len(heapq.heappop(kept)[2].encode())
    return (part for _, _, part in sorted(kept, key=lambda entry: entry[1]))


def _parts(documents: Iterable[Document]) -> Iterator[tuple[int, str]]:
    for document in documents:
        for start in range(0, len(document.text), _SAMPLE_CHARACTERS):
            seed = hashlib.blake2b(f"{document.name}\n{start}".encode("utf-8", "surrogateescape"), digest_size=8)
            yield int.from_bytes(seed.digest(), "big"), document.text[start : start + _SAMPLE_CHARACTERS]


def _before(content: bytes, at: int) -> bytes:
    return (_BEFORE + content[max(0, at - 2) : at])[-2:]


def _codes(text: str) -> np.ndarray:
    return _codes_of(_BEFORE, text.encode())


def _codes_of(before: bytes, content: bytes) -> np.ndarray:
    """[bytes] int64: each byte with the two before it, as a number below 256^3."""
    values = np.frombuffer(before + content, np.uint8).astype(np.int64)
    return (values[:-2] << 16) | (values[1:-1] << 8) | values[2:]


def _interpolated(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """p(c | context) = (max(n - D, 0) + D m p(c | shorter context)) / N, and p(c | shorter context) where N is 0.

    Args:
      counts: [..., 256], how often each byte follows each context; N is their sum, m the number of different bytes.
      lower: [..., 256] one context shorter, float32.
    """
    once, twice = np.count_nonzero(counts == 1) + 0.5, np.count_nonzero(counts == 2) + 0.5
    discount = once / (once + 2 * twice)
    total = counts.sum(axis=-1, keepdims=True)
    different = np.count_nonzero(counts, axis=-1)[..., None]
    share = np.where(total > 0, discount * different / np.maximum(total, 1), 1.0).astype(np.float32)
    own = (np.maximum(counts - discount, 0) / np.maximum(total, 1)).astype(np.float32)
    return own + share * lower
