"""Which row comes when: a permutation of all rows that is computed, not kept."""

import functools
import hashlib

import grain
import numpy as np

from data_pipelines.loading.rows import Place


class RowOrder:
    """The rows of some files, again and again, in another order each time. Can be pickled.

    window: files whose rows are shuffled together; None: all.
    """

    def __init__(self, rows: np.ndarray, *, seed: int, window: int | None = None, difficulty: np.ndarray | None = None):
        """
        Args:
          rows: [files] int64, rows of each file.
          seed: of the order.
          window: files whose rows are shuffled together, one such group after the other, so that no more files are read at a
            time; None: all rows are shuffled. The files themselves come in another order each time.
          difficulty: [files] of their texts: the files then come by it, the easy ones first, each time; window None is then 1.
        """
        self._rows, self._seed, self._difficulty = rows, seed, difficulty
        self.window = 1 if window is None and difficulty is not None else window
        self._window = len(rows) if self.window is None else self.window

    def __len__(self) -> int:
        """Rows of one time through."""
        return int(self._rows.sum())

    def __getitem__(self, number: int) -> Place:
        """The row that comes as the `number`-th, from 0 on; after the last of them it begins anew."""
        epoch, number = divmod(number, len(self))
        files, ends = _files(self, epoch)
        group = int(np.searchsorted(ends[self._window - 1 :: self._window], number, side="right"))
        first, last = group * self._window, min((group + 1) * self._window, len(files)) - 1
        begin = int(ends[first - 1]) if first else 0
        number = begin + _shuffled(int(ends[last]) - begin, self._seed, epoch, group, number - begin)
        at = int(np.searchsorted(ends, number, side="right"))
        return Place(epoch, int(files[at]), number - (int(ends[at - 1]) if at else 0))

    def files(self, epoch: int) -> np.ndarray:
        """[files]: which comes when."""
        if self._difficulty is not None:
            return np.argsort(self._difficulty, kind="stable")
        if self._window >= len(self._rows):  # all rows are shuffled
            return np.arange(len(self._rows))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))

    def ends(self, files: np.ndarray) -> np.ndarray:
        """[files]: how many rows there are up to the end of each."""
        return np.cumsum(self._rows[files])


@functools.lru_cache(maxsize=8)
def _files(order: RowOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    files = order.files(epoch)
    return files, order.ends(files)


@functools.lru_cache(maxsize=64)
def _permutation(size: int, *key: int) -> grain.MapDataset:
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")
    return grain.MapDataset.range(size).seed(seed).shuffle()


def _shuffled(size: int, seed: int, epoch: int, group: int, number: int) -> int:
    return _permutation(size, seed, epoch, group)[number]
