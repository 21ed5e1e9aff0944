"""From tokens on disk to packed batches, and from text to tokens: against other ways to do the same, in turns in one run."""

import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from data_pipelines import (
    Document,
    DocumentsConfig,
    LoaderConfig,
    Tokenizer,
    TokenizerConfig,
    TokenShards,
    evaluation_batches,
    pack_shards,
    read_documents,
    read_token_shards,
    train_tokenizer,
    training_batches,
    write_token_shards,
)
from experiments.benchmarks.processes import ROOT
from experiments.results import write_results

_ONE_HOST = {"process_index": 0, "process_count": 1}
_EVALUATION_PASSES = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """documents: of random ids, with lengths like those of the web. seq_len, batch_size: of the batches.

    batches: that each side makes at its turn; rounds: turns, of which the first is not timed. workers: processes to try.
    corpora: files of corpora of which only the indices exist, each of `file_tokens` ids, to be opened.
    """

    documents: int = 40_000
    seq_len: int = 4096
    batch_size: int = 32
    batches: int = 40
    rounds: int = 4
    workers: tuple[int, ...] = (1, 2)
    corpora: tuple[int, ...] = (150, 1_500, 15_000)
    file_tokens: int = 1 << 26

    def __post_init__(self):
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, since the first is not timed; got {self.rounds}")


class _Numbers(Tokenizer):
    """Not a tokenizer of text: a text is the seed and the number of its ids."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = 65_536, 1, 2, 0, "numbers"

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Random ids."""
        pairs = [tuple(map(int, text.split())) for text in texts]
        return [np.random.default_rng(seed).integers(10, self.vocab_size, count).tolist() for seed, count in pairs]

    def decode(self, ids: Sequence[int]) -> str:
        """There is none."""
        return ""

    def _find_symbol(self, symbol: str) -> int | None:
        return None


def _shards(config: Config, folder: epath.Path) -> TokenShards:
    """Documents with a median of 400 ids and a mean of about 930, in files of four million."""
    lengths = np.random.default_rng(0).lognormal(6, 1.3, config.documents).astype(int) + 1
    documents = (Document(f"{at} {length}", str(at)) for at, length in enumerate(lengths))
    return write_token_shards(documents, _Numbers(), folder, shard_tokens=1 << 22)


def main(config: Config, workdir: epath.Path) -> None:
    """Measures, prints and writes every figure."""
    shards = _shards(config, workdir / "tokens")
    packed = pack_shards(shards, config.seq_len)
    figures: dict[str, Any] = {"tokens": shards.tokens, "pad_share": packed.pad_share}
    figures |= _rates(config, shards, workdir)
    figures |= _evaluations(config, shards)
    figures["seconds_to_exit_after_a_failure"] = _failing(shards.folder)
    figures["opened"] = [_opened(config, files, workdir / f"corpus-{files}") for files in config.corpora]
    figures |= _tokenization(workdir)
    write_results(workdir, figures, config)


def _rates(config: Config, shards: TokenShards, workdir: epath.Path) -> dict[str, Any]:
    """Positions a second of each way, in turns, all but the workers on one core."""
    loader = LoaderConfig(seq_len=config.seq_len, batch_size=config.batch_size)
    sides: dict[str, Callable[[], Iterator[int]]] = {
        "ours": lambda: _ours(shards, loader),
        "sequential_read": lambda: _read_through(shards),
        **_datasets(config, shards, workdir / "arrow"),
    }
    for workers in config.workers:
        sides[f"ours_{workers}_workers"] = lambda workers=workers: _ours(shards, dataclasses.replace(loader, workers=workers))
    wanted = config.batches * config.batch_size * config.seq_len
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cores = os.sched_getaffinity(0)
    for turn in range(config.rounds):
        for name, side in sides.items():
            os.sched_setaffinity(0, cores if name.endswith("_workers") else {min(cores)})
            rate = _rate(side(), wanted)
            if turn:
                rates[name].append(rate)
    os.sched_setaffinity(0, cores)
    median = {name: float(np.median(values)) for name, values in rates.items()}
    ratio = lambda name: float(np.median(np.array(rates["ours"]) / rates[name]))
    return {
        **{f"{name}_tokens_per_second": rate for name, rate in median.items()},
        **{f"ours_over_{name}": ratio(name) for name in ("sequential_read", "datasets", "datasets_packed_before")},
    }  # fmt: skip


def _rate(counts: Iterator[int], wanted: int) -> float:
    """Positions a second, the first batch, which starts threads and processes, not counted."""
    next(counts)
    begin, done = time.perf_counter(), 0
    for count in counts:
        done += count
        if done >= wanted:
            break
    seconds = time.perf_counter() - begin
    counts.close()
    return done / seconds


def _ours(shards: TokenShards, loader: LoaderConfig) -> Iterator[int]:
    batches = training_batches([shards], loader, _Numbers(), **_ONE_HOST)
    try:
        for batch in batches:
            yield batch["tokens"].size
    finally:
        batches.close()


def _read_through(shards: TokenShards) -> Iterator[int]:
    """The same files from front to back, as arrays of ids, again and again; 512 records at a time."""
    from array_record.python import array_record_module

    while True:
        for shard in shards.shards:
            reader = array_record_module.ArrayRecordReader(os.fspath(shards.folder / shard.file))
            for first in range(0, shard.documents, 512):
                records = reader.read(first, min(first + 512, shard.documents))
                yield sum(len(np.frombuffer(record, np.uint16).astype(np.int32)) for record in records)


def _datasets(config: Config, shards: TokenShards, folder: epath.Path) -> dict[str, Callable[[], Iterator[int]]]:
    """Hugging Face datasets and torch's DataLoader: documents joined and cut into rows, as transformers' run_clm.py does.

    Once while they are loaded, and once beforehand, which is not timed: rows are then only read, in a shuffled order.
    """
    import datasets
    import pyarrow
    import torch

    datasets.disable_progress_bars()
    ids = np.concatenate([shards[document] for document in range(len(shards))])
    offsets = np.concatenate([[0], np.cumsum(shards.lengths)])
    documents = pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(ids))
    datasets.Dataset(pyarrow.table({"ids": documents})).save_to_disk(os.fspath(folder))
    stored = datasets.load_from_disk(os.fspath(folder))

    def rows(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [index for ids in batch["ids"] for index in (1, *ids, 2)]
        pieces = [joined[at : at + config.seq_len] for at in range(0, len(joined) - config.seq_len + 1, config.seq_len)]
        return {"input_ids": pieces, "labels": [list(piece) for piece in pieces]}

    def counts(packed: Any) -> Iterator[int]:
        while True:
            for batch in torch.utils.data.DataLoader(packed.with_format("torch"), batch_size=config.batch_size):
                yield batch["input_ids"].numel()

    mapped = {"function": rows, "batched": True, "remove_columns": ["ids"]}
    before = stored.shuffle(seed=0).map(**mapped).shuffle(seed=1)
    return {
        "datasets": lambda: counts(stored.shuffle(seed=0).to_iterable_dataset().map(**mapped)),
        "datasets_packed_before": lambda: counts(before),
    }


def _evaluations(config: Config, shards: TokenShards) -> dict[str, Any]:
    """Threads and memory that the second half of fifty passes over held-out batches leaves, and of iterators left half-way."""
    evaluation = evaluation_batches(shards, _Numbers(), seq_len=config.seq_len, batch_size=config.batch_size, **_ONE_HOST)
    loader = LoaderConfig(seq_len=config.seq_len, batch_size=config.batch_size)
    found = []
    for _ in range(_EVALUATION_PASSES):
        for _, _batch in zip(range(10), evaluation, strict=False):
            pass
        batches = training_batches([shards], loader, _Numbers(), **_ONE_HOST)
        next(batches)
        batches.close()
        gc.collect()
        for thread in threading.enumerate():
            if thread.name.startswith("grain"):  # it ends when it has made the batch that it is at
                thread.join(timeout=10)
        found.append((threading.active_count(), _resident_bytes()))
    (threads, memory), (last_threads, last_memory) = found[_EVALUATION_PASSES // 2], found[-1]
    return {"threads_gained": last_threads - threads, "resident_bytes_gained": last_memory - memory}


def _resident_bytes() -> int:
    pages = int(epath.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


_FAILING = """
import sys
from data_pipelines import LoaderConfig, read_token_shards, training_batches
from experiments.benchmarks.data import _Numbers
if __name__ == "__main__":
    loader = LoaderConfig(seq_len=256, batch_size=8, workers=2)
    batches = training_batches([read_token_shards(sys.argv[1])], loader, _Numbers(), process_index=0, process_count=1)
    next(batches)
    print("failing", flush=True)
    raise RuntimeError("a loop that fails")
"""


def _failing(folder: epath.Path) -> float:
    """Seconds until a process is gone whose loop raises while two others make batches for it."""
    command = [sys.executable, "-c", _FAILING, os.fspath(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    begin = time.perf_counter()
    _, errors = process.communicate(timeout=120)
    if "a loop that fails" not in errors:
        raise RuntimeError(f"the process failed in another way:\n{errors}")
    return time.perf_counter() - begin


_OPENING = """
import json, resource, sys, time
from data_pipelines import LoaderConfig, read_token_shards, training_batches
from experiments.benchmarks.data import _Numbers
before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
shards = read_token_shards(sys.argv[1])
loader = LoaderConfig(seq_len=int(sys.argv[2]), batch_size=8)
batches = training_batches([shards], loader, _Numbers(), process_index=0, process_count=1)
state = batches.get_state()
print(json.dumps({"tokens": shards.tokens, "seconds": time.perf_counter() - begin,
    "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), "state_bytes": len(json.dumps(state))}))
"""


def _opened(config: Config, files: int, folder: epath.Path) -> dict[str, Any]:
    """What it takes to open a corpus of so many files, of which only the two indices are there."""
    documents = config.file_tokens // 1000
    tokens, rows = files * config.file_tokens, config.file_tokens // config.seq_len
    entry = {
        "documents": documents, "tokens": config.file_tokens, "bytes": 0, "lengths_sha256": "", "difficulty": None,
    }  # fmt: skip
    index = {
        "format": 2, "documents": files * documents, "tokens": tokens, "text_bytes": 4 * tokens, "dtype": "<u2", "source": None,
        "records": {"seen": files * documents, "bad": {}}, "tokenizer": {"fingerprint": "numbers", "vocab_size": 65_536},
        "shards": [
            {"file": f"tokens-{file:05}-000.array_record", "sha256": f"{file:064}", **entry} for file in range(files)
        ],
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps(index))
    packed = {
        "format": 1, "tokens": read_token_shards(folder).fingerprint, "seq_len": config.seq_len, "fill_in_the_middle": 0.0,
        "pad_share": 0.001,
        "files": [{"rows": rows, "positions": rows * config.seq_len, "sha256": f"{file:064}"} for file in range(files)],
    }  # fmt: skip
    (folder / f"rows-{config.seq_len}").mkdir()
    (folder / f"rows-{config.seq_len}" / "index.json").write_text(json.dumps(packed))
    command = [sys.executable, "-c", _OPENING, os.fspath(folder), str(config.seq_len)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {"files": files, **json.loads(result.stdout.splitlines()[-1])}


def _tokenization(workdir: epath.Path) -> dict[str, Any]:
    """Tokens a second from documents to shards, and of the tokenizer's own encoding of the same text in memory, in turns."""
    documents = DocumentsConfig(source="stdlib")
    texts = [document.text for document in read_documents(documents, "train")]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=4096), (Document(text, "") for text in texts), workdir / "tokenizer")
    whole, alone = [], []
    for turn in range(3):
        begin = time.perf_counter()
        written = write_token_shards((Document(text, "") for text in texts), tokenizer, workdir / f"text-{turn}")
        middle = time.perf_counter()
        tokenizer.encode_batch(texts)
        whole.append(middle - begin)
        alone.append(time.perf_counter() - middle)
    return {
        "tokenization_tokens_per_second": written.tokens / float(np.median(whole)),
        "tokenization_over_encoding_seconds": float(np.median(np.array(whole) / np.array(alone))),
    }
