"""The first pass: everything that is to be known of each document by itself, in columns on disk."""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from etils import epath

from data_pipelines.preparation.decontamination import EvaluationNgrams
from data_pipelines.preparation.exact_duplicates import text_digest
from data_pipelines.preparation.near_duplicates import NearDuplicatesConfig, band_keys, signatures_of
from data_pipelines.preparation.passes import fingerprint, in_order, once, with_progress
from data_pipelines.preparation.quality import QualityConfig, judge, rules
from data_pipelines.preparation.word_hashes import WordHashes, plain_words
from data_pipelines.sources.documents import Document
from lfm_jax.configuration import ConfigError

# Documents of a part: what a killed run does again, at most.
PART_DOCUMENTS = 1 << 17
_BATCH_DOCUMENTS = 1 << 9
_BATCH_CHARACTERS = 1 << 22
_END = "scan.json"
_COLUMNS = {
    "fingerprints": ("<u8", 1), "sizes": ("<i8", 1), "digests": ("<u8", 2), "rules": ("<u1", 1), "values": ("<f4", 1),
    "hits": ("<i8", 2), "name_ends": ("<i8", 1),
}  # fmt: skip


class Measures(NamedTuple):
    """What is to be found out. None: that is not asked."""

    near_duplicates: NearDuplicatesConfig | None
    quality: QualityConfig | None
    evaluation: EvaluationNgrams | None


@dataclasses.dataclass
class _Measured:
    """Of a batch of documents. fingerprints, sizes (bytes of the text in UTF-8), digests [n, 2], rules (0: none is broken; else
    its number, from 1), values (of the rule), hits [m, 2] (document of the batch, n-gram), names, signatures [n, permutations],
    keys [bands, n]."""

    fingerprints: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    rules: np.ndarray
    values: np.ndarray
    hits: np.ndarray
    names: list[bytes]
    signatures: np.ndarray
    keys: np.ndarray


class Scan:
    """What a finished first pass has found. documents: their number."""

    def __init__(self, folder: epath.Path):
        """folder: of `scan_documents`."""
        self._folder = folder
        about = json.loads((folder / _END).read_text())
        self.documents: int = about["documents"]
        self._parts = [folder / name for name in about["parts"]]
        self._part_documents: int = about["part_documents"]
        self._permutations: int = about["permutations"]

    def column(self, name: str) -> np.ndarray:
        """fingerprints, sizes, digests [documents, 2], rules or values: [documents]; see `_Measured`."""
        kind, width = _COLUMNS[name]
        found = np.concatenate([np.frombuffer((part / name).read_bytes(), kind) for part in self._parts])
        return found.reshape(-1, width) if width > 1 else found

    def hits(self) -> Iterator[np.ndarray]:
        """[hits, 2] int64 of each part: (document, n-gram of the evaluation sets that it has)."""
        return (np.frombuffer((part / "hits").read_bytes(), "<i8").reshape(-1, 2) for part in self._parts)

    def band(self, index: int) -> np.ndarray:
        """[documents] uint64: each document's key in a band."""
        return np.concatenate([np.frombuffer((part / f"band_{index:03}").read_bytes(), "<u8") for part in self._parts])

    def signatures(self, documents: np.ndarray) -> np.ndarray:
        """[documents, permutations] uint32, of those asked for."""
        row_bytes = 4 * self._permutations
        rows = np.empty((len(documents), self._permutations), np.uint32)
        parts, places = np.divmod(documents, self._part_documents)
        for part in np.unique(parts):
            with (self._parts[part] / "signatures").open("rb") as file:
                for row in np.flatnonzero(parts == part):
                    file.seek(int(places[row]) * row_bytes)
                    rows[row] = np.frombuffer(file.read(row_bytes), "<u4")
        return rows

    def name(self, document: int) -> str:
        """The name of a document."""
        part, place = divmod(int(document), self._part_documents)
        with (self._parts[part] / "name_ends").open("rb") as file:
            file.seek(max(0, place - 1) * 8)
            ends = np.frombuffer(file.read(16 if place else 8), "<i8")
        start = int(ends[0]) if place else 0
        with (self._parts[part] / "names").open("rb") as file:
            file.seek(start)
            return file.read(int(ends[-1]) - start).decode("utf-8", "surrogateescape")


def scan_documents(
    documents: Callable[[], Iterable[Document]],
    measures: Measures,
    folder: epath.Path,
    *,
    workers: int = 0,
    part_documents: int = PART_DOCUMENTS,
) -> Scan:
    """Reads the source once and measures every document; goes on where an interrupted run stopped.

    On disk a document takes about 60 bytes and its name, and with near duplicates 4 bytes for each permutation and 8 for each
    band (`near_duplicates.bands`): some 800 bytes in all. In memory are the documents of a few batches.

    Args:
      documents: starts to read the source, the same each time.
      folder: gets folders of `part_documents` documents each, every one whole or not at all, and at the end a file that says so.
      workers: processes that measure; 0: this one. The result does not depend on their number.
    Raises:
      ConfigError: there is no document.
    """
    end = folder / _END
    if not end.exists():
        done = 0
        while (folder / _part_name(done)).exists():
            done += 1
        remaining = itertools.islice(documents(), done * part_documents, None)
        batches = in_order(_batches(with_progress(remaining, "reading"), part_documents), _measure, _start, (measures,), workers)
        with contextlib.closing(batches):
            total = _write_parts(batches, measures, folder, done, part_documents)
        if not total:
            raise ConfigError("the source has no document to prepare")
        permutations = measures.near_duplicates.permutations if measures.near_duplicates else 0
        about = {
            "documents": total, "parts": [_part_name(part) for part in range(-(-total // part_documents))],
            "part_documents": part_documents, "permutations": permutations,
        }  # fmt: skip
        part = folder / f".{_END}.part"
        part.write_text(json.dumps(about, indent=2) + "\n")
        part.rename(end)
    return Scan(folder)


def _part_name(index: int) -> str:
    return f"part-{index:05}"


def _batches(documents: Iterable[Document], part_documents: int) -> Iterator[list[Document]]:
    """The documents in groups, none of which reaches into the next part."""
    batch, characters = [], 0
    for count, document in enumerate(documents, start=1):
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS or count % part_documents == 0:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Worker:
    """What a process measures with."""

    measures: Measures
    hashes: WordHashes
    numbers: dict[str, int]


def _start(measures: Measures) -> None:
    _Worker.measures, _Worker.hashes = measures, WordHashes()
    _Worker.numbers = {name: number for number, name in enumerate(rules(measures.quality), start=1)} if measures.quality else {}


def _measure(documents: list[Document]) -> _Measured:
    near, quality, evaluation = _Worker.measures
    verdicts = [judge(document.text, quality, _Worker.hashes) if quality else None for document in documents]
    digests = np.frombuffer(b"".join(text_digest(document.text) for document in documents), "<u8").reshape(-1, 2)
    words = [_Worker.hashes(plain_words(document.text)) for document in documents] if near or evaluation else []
    hits = [np.zeros((0, 2), np.int64)]
    if evaluation:
        for index, own in enumerate(words):
            found = evaluation.find(own)
            hits.append(np.stack([np.full(len(found), index), found], axis=1))
    signatures = signatures_of(words, digests, near) if near else np.zeros((len(documents), 0), np.uint32)
    return _Measured(
        fingerprints=np.array([fingerprint(document) for document in documents], "<u8"),
        sizes=np.array([len(document.text.encode()) for document in documents], "<i8"),
        digests=digests,
        rules=np.array([_Worker.numbers[verdict.rule] if verdict else 0 for verdict in verdicts], "<u1"),
        values=np.array([verdict.value if verdict else 0.0 for verdict in verdicts], "<f4"),
        hits=np.concatenate(hits),
        names=[document.name.encode("utf-8", "surrogateescape") for document in documents],
        signatures=signatures,
        keys=band_keys(signatures, *near.bands) if near else np.zeros((0, len(documents)), np.uint64),
    )


def _write_parts(batches: Iterator[_Measured], measures: Measures, folder: epath.Path, done: int, part_documents: int) -> int:
    """Writes parts of the given number of documents from number `done` on; how many documents there are then in all."""
    while (first := next(batches, None)) is not None:
        write = functools.partial(_write_part, itertools.chain([first], batches), measures, done * part_documents, part_documents)
        once(folder / _part_name(done), write)
        done += 1
    if not done:
        return 0
    in_last = (folder / _part_name(done - 1) / "sizes").stat().length // 8
    return (done - 1) * part_documents + in_last


def _write_part(batches: Iterator[_Measured], measures: Measures, first: int, documents: int, part: epath.Path) -> None:
    """Writes batches until the part is full."""
    with _PartWriter(part, measures, first) as writer:
        for measured in batches:
            writer.add(measured)
            if writer.next == first + documents:
                return


class _PartWriter:
    """Appends to the columns of a part."""

    def __init__(self, folder: epath.Path, measures: Measures, first: int):
        """first: number of the part's first document. next: that of the one to be added."""
        bands = measures.near_duplicates.bands[0] if measures.near_duplicates else 0
        self._bands = [f"band_{index:03}" for index in range(bands)]
        self._folder, self.next, self._name_end = folder, first, 0

    def __enter__(self) -> "_PartWriter":
        self._stack = contextlib.ExitStack()
        self._files: dict[str, BinaryIO] = {
            name: self._stack.enter_context((self._folder / name).open("wb"))
            for name in (*_COLUMNS, "names", "signatures", *self._bands)
        }
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, measured: _Measured) -> None:
        """Writes a batch."""
        ends = self._name_end + np.cumsum([len(name) for name in measured.names], dtype=np.int64)
        self._name_end = int(ends[-1])
        columns = {**vars(measured), "hits": measured.hits + [self.next, 0], "name_ends": ends}
        for name, (kind, _) in _COLUMNS.items():
            self._files[name].write(np.ascontiguousarray(columns[name], kind).tobytes())
        self._files["names"].write(b"".join(measured.names))
        self._files["signatures"].write(np.ascontiguousarray(measured.signatures, "<u4").tobytes())
        for name, keys in zip(self._bands, measured.keys, strict=True):
            self._files[name].write(np.ascontiguousarray(keys, "<u8").tobytes())
        self.next += len(measured.names)
