"""A corpus tokenized on all cores of one machine, in processes; what they have finished stays when they are stopped."""

import concurrent.futures
import multiprocessing
import os
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from etils import epath
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipelines.processes import end_with_parent
from data_pipelines.sources.documents import DocumentsConfig, Split
from data_pipelines.tokenization.assembly import Assembly
from data_pipelines.tokenization.token_shards import TokenShards, read_token_shards
from data_pipelines.tokenization.tokenizer import Tokenizer
from data_pipelines.tokenization.units import Advance, TokenizationConfig, Unit, Work, tokenize_unit

_SECONDS_BETWEEN_LOOKS = 0.5


class _Process(NamedTuple):
    """What a worker has."""

    work: Work
    tokenizer: Tokenizer
    done: Any  # source bytes and tokens, shared by all processes


_process: _Process | None = None


def tokenize_corpus(
    data: DocumentsConfig, split: Split, tokenizer: Tokenizer, folder: epath.PathLike, config: TokenizationConfig
) -> TokenShards:
    """Tokenizes one split of a source into a new folder, which appears when all of it is there.

    The source's files are dealt out to processes in units. A unit is kept as soon as it is finished, in a hidden folder beside
    the one to be: after an interruption, `kill -9` included, the same call goes on with the others. The folder's bytes depend
    neither on interruptions nor on the number of processes. It holds the files that `read_token_shards` reads, and
    `quarantine.jsonl` with every record that could not be read.

    Args:
      tokenizer: can be pickled, as those of `load_tokenizer` can.
      folder: must not exist.
    Raises:
      FileExistsError: the folder is there already.
      FileNotFoundError: the source does not exist.
      ValueError: a file of the source is damaged, too many records cannot be read, there is no document, or an interrupted run
        had other settings.
      RuntimeError: a process was ended from outside.
    """
    assembly = Assembly(data, split, tokenizer, folder, config)
    # The largest first, so that none is left for the end.
    units = sorted(assembly.missing, key=lambda unit: -unit.bytes)
    workers = min(len(units), config.workers or _cores())
    with _Display(assembly, split) as display:
        if workers > 1:
            _in_processes(assembly, units, tokenizer, workers, display)
        else:
            for unit in units:
                tokenize_unit(assembly.work, unit, tokenizer, None, display.advance)
                assembly.finished(unit)
    assembly.finish()
    return read_token_shards(folder, tokenizer)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Display:
    """A line of progress: source bytes done, tokens a second, time left."""

    def __init__(self, assembly: Assembly, split: str):
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        figures = TextColumn("{task.fields[figures]}")
        self._progress = Progress(*columns, figures, disable=not sys.stderr.isatty(), transient=True)
        self._done = assembly.source_bytes - sum(unit.bytes for unit in assembly.missing)
        self._task = self._progress.add_task(f"tokenizing {split}", total=assembly.source_bytes, completed=self._done, figures="")
        self._tokens, self._start = 0, time.monotonic()

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, by: Advance) -> None:
        """Shows that more was done."""
        self.show(self._done + by.source_bytes, self._tokens + by.tokens)

    def show(self, source_bytes: int, tokens: int) -> None:
        """Shows what was done in all."""
        self._done, self._tokens = source_bytes, tokens
        rate = tokens / max(1e-3, time.monotonic() - self._start)
        self._progress.update(self._task, completed=source_bytes, figures=f"{tokens:,} tokens, {rate:,.0f} a second")


def _in_processes(assembly: Assembly, units: list[Unit], tokenizer: Tokenizer, workers: int, display: _Display) -> None:
    spawn = multiprocessing.get_context("spawn")
    done = spawn.Array("q", [assembly.source_bytes - sum(unit.bytes for unit in units), 0])
    unfinished = sum(unit.bytes for unit in units)
    waiting = units[::-1]
    running: dict[concurrent.futures.Future, Unit] = {}
    arguments = (assembly.work, tokenizer, done)
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_process, arguments) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    unit = waiting.pop()
                    running[pool.submit(_run_unit, unit, _share_of(_cores(), unit.bytes, unfinished))] = unit
                ready, _ = concurrent.futures.wait(running, _SECONDS_BETWEEN_LOOKS, concurrent.futures.FIRST_COMPLETED)
                display.show(*done)
                for future in ready:
                    unit = running.pop(future)
                    future.result()
                    assembly.finished(unit)
                    unfinished -= unit.bytes
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that tokenized was ended from outside, maybe for want of memory; what is finished stays, and the same "
                "command goes on: fewer workers, or a smaller max_text_bytes, need less memory"
            ) from error


def _share_of(cores: int, unit_bytes: int, all_bytes: int) -> int:
    """Threads for a unit: its share of all that is left to do, so that one large file among small ones has most of the cores."""
    return max(1, round(cores * unit_bytes / max(1, all_bytes)))


def _start_process(work: Work, tokenizer: Tokenizer, done: Any) -> None:
    """Prepares a worker."""
    global _process
    _process = _Process(work, tokenizer, done)
    # Each has the threads it is given, and no pool of the tokenizers package beside them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()


def _run_unit(unit: Unit, threads: int) -> None:
    def report(advance: Advance) -> None:
        with _process.done.get_lock():
            _process.done[0] += advance.source_bytes
            _process.done[1] += advance.tokens

    tokenize_unit(_process.work, unit, _process.tokenizer, threads, report)
