"""Documents packed into rows of a fixed length, decided from their lengths alone."""

import hashlib
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Which pieces of which documents are in which row. Arrays are int64.

    The pieces of row r are those from offsets[r] to offsets[r + 1]. A piece is `lengths` positions of a document of n ids, which
    has n + 1 of them, from position `starts` on. seq_len: positions of a row.
    """

    offsets: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    seq_len: int

    def __len__(self) -> int:  # of rows, not of fields
        """The number of rows."""
        return len(self.offsets) - 1

    @property
    def pad_share(self) -> float:
        """The share of positions that no document has."""
        return 1 - int(self.lengths.sum()) / (len(self) * self.seq_len)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of it all."""
        digest = hashlib.sha256(str(self.seq_len).encode())
        for array in self[:-1]:
            digest.update(np.ascontiguousarray(array, "<i8"))
        return digest.hexdigest()


def pack_documents(lengths: np.ndarray, seq_len: int, seed: int) -> Packing:
    """Packs documents into few rows, and shuffles the rows.

    A document longer than a row fills rows of its own, and its rest is packed like a document; nothing else is cut (Ding et al.
    2024, "Fewer Truncations Improve Language Modeling"). Instead of that paper's best fit, rows are filled with exact fits where
    there are any, which leaves less padding in the same time (`_fill_rows`). Which documents of a length meet is left to chance,
    and so are the order of the rows and with it the lengths in any part of them.

    Args:
      lengths: [documents] ids of each.
      seq_len: positions of a row.
      seed: the same lengths, seq_len and seed give the same rows.
    Raises:
      ValueError: `seq_len` is not positive.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be positive, got {seq_len}")
    random = np.random.default_rng(seed)
    whole_rows, rest = np.divmod(np.asarray(lengths, np.int64) + 1, seq_len)
    short = random.permutation(np.flatnonzero(rest))
    row_of_short = _fill_rows(rest[short], seq_len)
    packed_rows = int(row_of_short.max(initial=-1)) + 1

    long = np.repeat(np.arange(len(rest)), whole_rows)
    piece_of_document = np.arange(len(long)) - np.repeat(np.cumsum(whole_rows) - whole_rows, whole_rows)
    rows = np.concatenate([row_of_short, packed_rows + np.arange(len(long))])
    documents = np.concatenate([short, long])
    starts = np.concatenate([whole_rows[short] * seq_len, piece_of_document * seq_len])
    positions = np.concatenate([rest[short], np.full(len(long), seq_len)])

    row_count = packed_rows + len(long)
    rows = random.permutation(row_count)[rows]
    order = np.argsort(rows, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=row_count))])
    return Packing(offsets, documents[order], starts[order], positions[order], seq_len)


def _fill_rows(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each piece.

    Rows are filled one after the other: with the longest piece left that fits, again and again; but as soon as one piece, or two,
    would fill the row exactly, with these.
    """
    left: list[list[int]] = [[] for _ in range(seq_len + 1)]  # pieces by length
    for piece, length in enumerate(lengths.tolist()):
        left[length].append(piece)
    present = sum(1 << length for length in range(seq_len + 1) if left[length])  # bit n: there are pieces of n positions
    mirrored = sum(1 << seq_len - length for length in range(seq_len + 1) if left[length])  # bit seq_len - n, likewise
    rows, row = [0] * len(lengths), 0
    while present:
        room = seq_len
        while room and (fitting := present & ((2 << room) - 1)):
            length = fitting.bit_length() - 1
            pairs = 0 if length == room else present & (mirrored >> (seq_len - room))  # bit n: pieces of n and of room - n
            if not room % 2 and len(left[room // 2]) == 1:
                pairs &= ~(1 << room // 2)
            longest = pairs.bit_length() - 1
            for taken in (longest, room - longest) if pairs else (length,):
                rows[left[taken].pop()] = row
                room -= taken
                if not left[taken]:
                    present ^= 1 << taken
                    mirrored ^= 1 << seq_len - taken
        row += 1
    return np.asarray(rows, np.int64)
