"""What llama.cpp makes of a GGUF file: its ids, log-probabilities and greedy continuations, to compare with our own.

The runtime is the package xllamacpp, a prebuilt llama.cpp with its server inside. It can end the process that it runs in (it
aborts at two tokens with one text), so it gets a process of its own, with limits (`lfm_jax.isolation.limits`).
"""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from experiments import llama_cpp_process
from lfm_jax.isolation.limits import Limits, call_limited

# Beside the weights: the library and Python, and what a context takes.
_LEAST_BYTES = 6 << 30
# The file itself is mapped, and some types are copied in another order.
_FILES_IN_MEMORY = 3


class LlamaCppAnswers(NamedTuple):
    """What `run_llama_cpp` was asked for, each in the order of the request.

    ids: of each text, without beginning-of-text. chat_ids: of each chat as the file's template writes it, as a server would give
    them to the model. log_probs: of each token but the first of each sequence, given those before it. next_log_probs: of every id
    after each sequence. continuations: new ids of each prompt, the one that ends it included.
    prefill_tokens_per_second, decode_tokens_per_second: of the prompts, and of each continuation; None where there were none.
    """

    ids: list[list[int]]
    chat_ids: list[list[int]]
    log_probs: list[list[float]]
    next_log_probs: list[list[float]]
    continuations: list[list[int]]
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None

    @property
    def perplexity(self) -> float:
        """Of all tokens in `log_probs`: the exponential of their mean negative log-probability."""
        flat = [value for values in self.log_probs for value in values]
        return math.exp(-sum(flat) / len(flat))


def llama_cpp_installed() -> bool:
    """Whether `run_llama_cpp` can run."""
    return importlib.util.find_spec("xllamacpp") is not None


def run_llama_cpp(
    file: epath.PathLike,
    *,
    texts: Sequence[str] = (),
    symbols: bool = False,
    chats: Sequence[Sequence[Mapping[str, Any]]] = (),
    scored: Sequence[Sequence[int]] = (),
    followed: Sequence[Sequence[int]] = (),
    prompts: Sequence[Sequence[int]] = (),
    new_tokens: int = 64,
    parallel: int = 1,
    threads: int = 1,
    seconds: int = 600,
) -> LlamaCppAnswers:
    """Loads a GGUF file in llama.cpp, on the CPU and with a cache in float32, and asks it.

    Args:
      file: on a local disk.
      texts: to tokenise. symbols: whether the spelling of a special symbol in them is that symbol.
      chats: lists of messages, each a turn that the assistant is to answer.
      scored: ids whose log-probabilities to give, at least two in each. A token costs a step, and the cache is used as in a chat.
      followed: ids after which to give the log-probabilities of all ids. Each is computed at once, without a cache.
      prompts: ids to continue greedily by at most `new_tokens`.
      parallel: prompts that are continued at the same time.
      threads: of llama.cpp. seconds: of processor time, for everything.
    Raises:
      ImportError: xllamacpp is not installed.
      LimitError: llama.cpp ended its process, or took more than `seconds`, or than three times the file and 6 GiB of memory.
      ValueError: llama.cpp does not load the file, or refuses a request; with what it says.
    """
    if not llama_cpp_installed():
        raise ImportError("GGUF files are run with the package xllamacpp; install it: pip install 'lfm_jax[test]'")
    file = epath.Path(file)
    job = {
        "file": str(file), "texts": list(texts), "symbols": symbols, "chats": list(chats), "scored": _plain(scored),
        "followed": _plain(followed), "prompts": _plain(prompts), "new_tokens": new_tokens, "parallel": parallel,
        "threads": threads,
    }  # fmt: skip
    memory = _LEAST_BYTES + _FILES_IN_MEMORY * file.stat().length
    limits = Limits(cpu_seconds=seconds, seconds=10.0 * seconds, memory_bytes=memory)
    answers = call_limited(llama_cpp_process.answer, json.dumps(job).encode(), name=str(file), limits=limits)
    return LlamaCppAnswers(**answers)


def _plain(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[int(index) for index in sequence] for sequence in sequences]
