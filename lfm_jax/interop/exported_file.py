"""What all exported programs have in common: how they are written, run, compared with our own logits, and timed.

Every exporter writes under a temporary name, runs the file in its runtime against our logits, and only then renames it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import logging
import multiprocessing
import os
import pathlib
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, functional
from lfm_jax.models.functional import Tree

# Float32 programs that sum up in another order differ by 1e-5 of the largest logit; a wrong one by tenths.
MOST_RELATIVE_DIFFERENCE = 1e-3


class Reference(NamedTuple):
    """What an exported program is compared with. tokens: [seq] int64; logits: [seq, vocab] float32, of our own model."""

    tokens: np.ndarray
    logits: np.ndarray


class ExportedFile(NamedTuple):
    """A file that has run in its runtime.

    bytes: with the file of weights beside it, where there is one. max_logit_difference: to our logits, over all positions that
    were compared and all ids. greedy_agreement: share of these positions where both have the same largest logit.
    """

    file: pathlib.Path
    bytes: int
    max_logit_difference: float
    greedy_agreement: float


class Speed(NamedTuple):
    """first_token_seconds: from a prompt to the logits behind it. tokens_per_second: after that, one by one (the median).
    peak_bytes: of memory, above what the process had before it opened the file; pages of the file that were read count."""

    first_token_seconds: float
    tokens_per_second: float
    peak_bytes: int


class Conversation:
    """One sequence in some runtime.

    step: (tokens [1, n] int64, state) -> (logits [1, ids] float32, state). initial: the state before the first token.
    capacity: tokens of a sequence; chunk: the most tokens of one step, where longer prompts need several.
    """

    def __init__(self, step: Callable[[np.ndarray, Any], tuple[np.ndarray, Any]], initial: Any, capacity: int, chunk: int):
        self._step, self._initial, self.capacity, self._chunk = step, initial, capacity, chunk
        self.begin()

    def begin(self) -> None:
        """Forgets the sequence: the next token is the first of another."""
        self._state, self._length = self._initial, 0

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Continues the sequence; returns the logits behind the last of the tokens, [ids].

        Raises:
          ValueError: the sequence would be longer than the capacity.
        """
        if self._length + len(tokens) > self.capacity:
            raise ValueError(f"{self._length} + {len(tokens)} tokens are more than the capacity of this file, {self.capacity}")
        self._length += len(tokens)
        for start in range(0, len(tokens), self._chunk):
            chunk = np.asarray(tokens[start : start + self._chunk], np.int64)[None]
            logits, self._state = self._step(chunk, self._state)
        return logits[0]


def reference_logits(config: ModelConfig, params: Tree, buffers: Tree, tokens: Sequence[int]) -> Reference:
    """Our own logits of a text, in float32: made once, for all exporters of a model."""
    functions = functional(lambda rngs: Decoder(config, ComputeConfig(dtype="float32"), rngs=rngs))

    def forward(params: Tree, buffers: Tree, tokens: jax.Array) -> jax.Array:
        model = functions.bind(params, buffers)
        return model.logits(model(tokens).hidden)

    logits = jax.jit(forward)(params, buffers, np.asarray(tokens, np.int32)[None])
    return Reference(np.asarray(tokens, np.int64), np.asarray(logits[0]))


def check_capacity(config: ModelConfig, capacity: int, reference: Reference) -> None:
    """Raises ValueError unless the model can be exported for sequences of `capacity` tokens and compared on the reference."""
    if not 2 <= capacity <= config.context_length:
        raise ValueError(f"capacity must be from 2 to the model's context_length {config.context_length}, got {capacity}")
    if not 2 <= len(reference.tokens) <= capacity:
        raise ValueError(f"the text to compare on has {len(reference.tokens)} tokens; give 2 to the capacity {capacity}")


def check_installed(*packages: str) -> None:
    """Raises ModuleNotFoundError, with what to run, where one is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"not installed: {', '.join(missing)}; run: pip install -c constraints.txt -e '.[export]'")


def judge(conversation: Conversation, reference: Reference, *, exact: bool = True) -> tuple[float, float]:
    """Reads half of the text at once and the rest one by one, and the half once more as another sequence.

    Returns, args: see `compare`.
    Raises:
      ValueError: see `compare`; or the second sequence gets other logits than the first.
    """
    tokens, half = reference.tokens, len(reference.tokens) // 2
    conversation.begin()
    found = [conversation.feed(tokens[:half])] + [conversation.feed(tokens[at : at + 1]) for at in range(half, len(tokens))]
    conversation.begin()
    if not np.array_equal(conversation.feed(tokens[:half]), found[0], equal_nan=True):
        raise ValueError("a second sequence gets other logits than the first: the file keeps something of it")
    return compare(np.stack(found), reference.logits[half - 1 :], exact=exact)


def compare(found: np.ndarray, expected: np.ndarray, *, exact: bool = True) -> tuple[float, float]:
    """The largest difference of a logit, and the share of positions with the same largest one.

    Args:
      found: [seq, ids]; expected: [seq, vocab], ours, of which the first ids are compared.
      exact: whether the logits must be ours (to 1e-3 of the largest); otherwise they must be finite.
    Raises:
      ValueError: they are not.
    """
    expected = expected[:, : found.shape[1]]
    difference, largest = float(np.max(np.abs(found - expected))), float(np.max(np.abs(expected)))
    if not np.isfinite(difference) or exact and difference > MOST_RELATIVE_DIFFERENCE * largest:
        raise ValueError(f"the file's logits differ by {difference:.3g} from ours, the largest of which is {largest:.3g}")
    return difference, float(np.mean(np.argmax(found, axis=1) == np.argmax(expected, axis=1)))


def finished(path: str | os.PathLike, found: tuple[float, float]) -> ExportedFile:
    """What an exporter returns."""
    file = pathlib.Path(path)
    beside = file.with_name(f"{file.name}.data")
    return ExportedFile(file, sum(part.stat().st_size for part in (file, beside) if part.exists()), *found)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A path to write to, in a new folder beside `path`; what is in the folder moves to its place when the block ends well.

    Raises:
      OSError: something cannot be written; nothing is left, and an earlier file is as it was.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield pathlib.Path(folder) / path.name
            for file in sorted(pathlib.Path(folder).iterdir(), reverse=True):  # what the file refers to goes before it
                file.replace(path.parent / file.name)
    except OSError as error:
        raise OSError(error.errno, f"{path} was not written, and nothing is left of it: {error.strerror or error}") from error


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """PyTorch 2.13, ExecuTorch 1.5.1 and torchao 0.18 warn of what they do themselves: deprecated ways to read their own files
    and to register their own classes, kernels for machines that are not here, and that their interfaces may change."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def measure_speed(
    opened: Callable[[str], Conversation], path: str | os.PathLike, *, prompt_tokens: int = 128, new_tokens: int = 32
) -> Speed:
    """Runs a file in a process of its own.

    Args:
      opened: `open_pt2`, `open_onnx` or `open_executorch`.
      prompt_tokens, new_tokens: the file's capacity must hold both.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measure, opened, os.fspath(path), prompt_tokens, new_tokens).result()


def _measure(opened: Callable[[str], Conversation], path: str, prompt_tokens: int, new_tokens: int) -> Speed:
    import torch  # noqa: F401  the runtimes' Python sides bring it, which is none of the file's memory

    before = _memory("VmRSS")
    conversation = opened(path)

    def timed(tokens: int) -> float:
        started = time.perf_counter()
        conversation.feed([1] * tokens)
        return time.perf_counter() - started

    first = []
    for _ in range(6):
        conversation.begin()
        first.append(timed(prompt_tokens))
    next_ = statistics.median(timed(1) for _ in range(new_tokens))
    # The first time memory is found and weights are laid out.
    return Speed(statistics.median(first[1:]), 1 / next_, _memory("VmHWM") - before)


def _memory(field: str) -> int:
    """Bytes of this process by Linux's count: VmRSS now, VmHWM at its peak."""
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)
