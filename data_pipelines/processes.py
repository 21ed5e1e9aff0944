"""Worker processes that do not outlive the one that started them."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing import connection


def end_with_parent() -> None:
    """Called in a worker: ends it when the process that started it is gone.

    That one may be killed without a word, which the pools of `concurrent.futures` do not notice: their workers would wait for
    work forever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel, os._exit), daemon=True).start()


def _end_with(sentinel: int, leave: Callable[[int], None]) -> None:
    connection.wait([sentinel])
    leave(1)
