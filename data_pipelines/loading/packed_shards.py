"""Rows of a fixed length out of token shards: decided once, file by file, and kept beside them."""

import concurrent.futures
import functools
import hashlib
import io
import json
import multiprocessing
import os
import uuid
from typing import Any

import numpy as np
from etils import epath
from rich.progress import track

from data_pipelines.loading.fill_in_the_middle import chosen_documents, grown_lengths
from data_pipelines.loading.packing import Packing, pack_documents
from data_pipelines.processes import end_with_parent
from data_pipelines.tokenization.shard_writer import is_remote, publish
from data_pipelines.tokenization.token_shards import TokenShards

INDEX = "index.json"
_FORMAT = 1
# Below this one process is done before others have started.
_DOCUMENTS_FOR_SEVERAL_PROCESSES = 1 << 22
# Files whose rows a process keeps at hand; of local ones only what is looked at is read.
_OPEN = 256


class PackedShards:
    """The rows that the documents of token shards make. Can be pickled.

    shards: the token shards. seq_len: positions of a row. fill_in_the_middle: share of the documents that are told with their
    middle last. rows: [files] int64, rows of each file of the shards. pad_share: the share of positions that no document has.
    fingerprint: of all of it.
    """

    def __init__(self, shards: TokenShards, folder: epath.Path, index: dict[str, Any]):
        """folder, index: as `pack_shards` has written and checked them."""
        self.shards = shards
        self.seq_len: int = index["seq_len"]
        self.fill_in_the_middle: float = index["fill_in_the_middle"]
        self.rows = np.array([file["rows"] for file in index["files"]], np.int64)
        self.pad_share: float = index["pad_share"]
        self.fingerprint = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
        self._folder = folder
        self._sha256 = [file["sha256"] for file in index["files"]]

    def packing(self, shard: int) -> Packing:
        """Which pieces of which documents are in which row, of one file.

        Raises:
          FileNotFoundError, ValueError: what was kept is gone or damaged; the message names the file.
        """
        return _read_packing(_path(self._folder, shard), self._sha256[shard], self.seq_len)

    def moved_middles(self, shard: int) -> np.ndarray:
        """[documents] bool: those of a file whose middle is told last."""
        return _moved_middles(self, shard)


@functools.lru_cache(maxsize=_OPEN)
def _moved_middles(packed: PackedShards, shard: int) -> np.ndarray:
    return chosen_documents(packed.shards.lengths_of(shard), packed.seq_len, packed.fill_in_the_middle, shard)


def pack_shards(
    shards: TokenShards, seq_len: int, *, fill_in_the_middle: float = 0.0, processes: int | None = None
) -> PackedShards:
    """The rows of token shards, from the folder `rows-SEQ_LEN` in theirs, where they are made first if they are not there.

    Each file is packed by itself, so that rows can be found without an index of the whole corpus in memory: of a file the rows
    take 12 bytes a piece of a document. What is finished stays when the run is stopped, and the same call goes on with the rest.
    Several runs may be at it at the same time.

    Args:
      seq_len: positions of a row.
      fill_in_the_middle: share of the documents that fit into a row whose middle is told last; these are three symbols longer.
      processes: None: one for each core where there is enough to do.
    Raises:
      ValueError: `seq_len` is not positive, or rows were made of other tokens.
    """
    folder = rows_folder(shards, seq_len, fill_in_the_middle)
    if not (folder / INDEX).exists():
        try:
            _make(shards, seq_len, fill_in_the_middle, folder, processes)
        except OSError:
            if not (folder / INDEX).exists():  # another run, at the same rows at the same time, has let the folder appear
                raise
    index = json.loads((folder / INDEX).read_text())
    if index["format"] != _FORMAT or index["tokens"] != shards.fingerprint:
        raise ValueError(f"{folder} holds the rows of other tokens, or of another version; delete it to make them again")
    return PackedShards(shards, folder, index)


def rows_folder(shards: TokenShards, seq_len: int, fill_in_the_middle: float = 0.0) -> epath.Path:
    """Where the rows of token shards are kept."""
    return shards.folder / (f"rows-{seq_len}" + (f"-fim-{fill_in_the_middle:g}" if fill_in_the_middle else ""))


def _make(shards: TokenShards, seq_len: int, share: float, folder: epath.Path, processes: int | None) -> None:
    part = folder.parent / f".{folder.name}.{shards.fingerprint[:16]}.part"
    part.mkdir(parents=True, exist_ok=True)
    jobs = [(shards, shard, seq_len, share, part) for shard in range(len(shards.shards))]
    if processes is None:
        processes = os.cpu_count() if shards.documents >= _DOCUMENTS_FOR_SEVERAL_PROCESSES else 1
    if processes > 1:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, spawn, end_with_parent) as pool:
            files = list(track(pool.map(_pack_file, jobs), f"packing rows of {seq_len:,}", len(jobs), transient=True))
    else:
        files = [_pack_file(job) for job in track(jobs, f"packing rows of {seq_len:,}", transient=True)]
    rows, positions = (sum(file[name] for file in files) for name in ("rows", "positions"))
    index = {
        "format": _FORMAT, "tokens": shards.fingerprint, "seq_len": seq_len, "fill_in_the_middle": share,
        "pad_share": 1 - positions / (rows * seq_len), "files": files,
    }  # fmt: skip
    _write_whole(part / INDEX, json.dumps(index, indent=2).encode())
    publish(part, folder)


def _write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file that appears when it is whole, whoever else writes it."""
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _path(folder: epath.Path, shard: int) -> epath.Path:
    return folder / f"{shard:05}.npy"


def _pack_file(job: tuple[TokenShards, int, int, float, epath.Path]) -> dict[str, Any]:
    """Packs one file, unless that is done, and says what came out of it."""
    shards, shard, seq_len, share, folder = job
    path = _path(folder, shard)
    if not path.exists():
        lengths = shards.lengths_of(shard)
        moved = chosen_documents(lengths, seq_len, share, shard)
        packing = pack_documents(grown_lengths(lengths, moved), seq_len, seed=shard)
        flat = np.concatenate([[len(packing)], packing.offsets, packing.documents, packing.starts, packing.lengths])
        content = io.BytesIO()
        np.save(content, flat.astype("<u4"))
        _write_whole(path, content.getvalue())
    content = path.read_bytes()
    packing = _from_flat(np.load(io.BytesIO(content), allow_pickle=False), seq_len)
    positions = int(packing.lengths.sum(dtype=np.int64))
    return {"rows": len(packing), "positions": positions, "sha256": hashlib.sha256(content).hexdigest()}


@functools.lru_cache(maxsize=_OPEN)
def _read_packing(path: epath.Path, sha256: str, seq_len: int) -> Packing:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; delete the folder to make its rows again")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} has changed since it was written (SHA-256); delete the folder to make its rows again")
    file, mode = (io.BytesIO(content), None) if is_remote(path) else (os.fspath(path), "r")
    flat = np.load(file, mmap_mode=mode, allow_pickle=False)
    return _from_flat(flat, seq_len)


def _from_flat(flat: np.ndarray, seq_len: int) -> Packing:
    offsets, rest = np.split(flat[1:], [int(flat[0]) + 1])
    return Packing(offsets, *np.split(rest, 3), seq_len)
