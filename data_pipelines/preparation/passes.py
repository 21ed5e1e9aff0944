"""Passes over a source: work that leaves a finished folder or nothing, and the same documents each time."""

import collections
import concurrent.futures
import hashlib
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from etils import epath
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from data_pipelines.processes import end_with_parent
from data_pipelines.sources.documents import Document
from lfm_jax.configuration import ConfigError

S = TypeVar("S")
T = TypeVar("T")

# Tasks in flight for each worker: one that it is at, one that waits.
_AHEAD = 2


def once(folder: epath.Path, make: Callable[[epath.Path], object]) -> None:
    """Makes a folder that is not there yet: `make` fills a hidden sibling, which then takes its name.

    What an interrupted run has left of the sibling is removed first.
    """
    if folder.exists():
        return
    part = folder.parent / f".{folder.name}.part"
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    make(part)
    part.rename(folder)


def fingerprint(document: Document) -> int:
    """8 bytes of BLAKE2b of name and text: whether a document is the one that it was in an earlier pass."""
    content = f"{document.name}\n{document.text}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def same_documents(documents: Iterable[Document], fingerprints: Iterable[int]) -> Iterator[Document]:
    """The documents, each compared with its fingerprint of an earlier pass.

    Raises:
      ConfigError: the source has changed since.
    """
    index = -1
    expected = iter(fingerprints)
    for index, document in enumerate(documents):
        if fingerprint(document) != next(expected, None):
            raise ConfigError(
                f"document {index} ({document.name!r}) is not what it was when the source was first read; prepare the source "
                "as it is now in another workdir"
            )
        yield document
    if next(expected, None) is not None:
        raise ConfigError(
            f"the source ends after {index + 1} documents, and had more when it was first read; prepare it as it is now in "
            "another workdir"
        )


def with_progress(documents: Iterable[T], description: str) -> Iterator[T]:
    """The same documents; on a terminal, a line says how many have passed, and how many a second."""
    columns = (TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(description, total=None, figures="")
        for count, document in enumerate(documents, start=1):
            yield document
            seconds = progress.tasks[0].elapsed or 0.0
            if count % 64 == 0:
                progress.update(task, figures=f"{count:,} documents, {count / max(seconds, 1e-9):,.0f} documents a second")


def in_order(tasks: Iterable[S], make: Callable[[S], T], start: Callable[..., None], about: tuple, workers: int) -> Iterator[T]:
    """`make` of each task, in the order of the tasks, in worker processes; at most a few tasks for each are in memory.

    Args:
      make, start: functions of a module. start: is called with `about` once in each process, before its first task.
      workers: number of processes; 0: this one does it.
    """
    if not workers:
        start(*about)
        yield from map(make, tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (start, about))
    waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(make, task))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(start: Callable[..., None], about: tuple[Any, ...]) -> None:
    end_with_parent()
    start(*about)
