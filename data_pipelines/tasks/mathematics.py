"""Mathematical answers in LaTeX, compared by math-verify (the extra `eval`) in a child process.

math-verify hands what it reads to SymPy, which an answer can keep busy for hours ("9^{9^{9}}"); its own timeouts are signals,
which only the main thread of a process gets. This file is what the child runs, so it imports nothing of ours at its top.
"""

import importlib.util
import json
from collections.abc import Sequence

# Of an answer; what is longer is equal to nothing. math-verify takes seconds for a sum of three thousand terms.
_MOST_CHARACTERS = 1000
_SECONDS_TO_PARSE = 1
_SECONDS_TO_COMPARE = 2
_MEMORY_BYTES = 1 << 31


def equal_mathematics(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the (answer, reference) of each pair are the same mathematics, as LaTeX or plainly written.

    Starting the child takes about a second, so many pairs are better given at once. What cannot be read, and what takes more than
    a few seconds or the child's memory, is not equal; the other pairs have their verdicts all the same.

    Raises:
      ModuleNotFoundError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ModuleNotFoundError("comparing mathematics takes math-verify, which is not here: pip install 'lfm_jax[eval]'")
    short = [at for at, pair in enumerate(pairs) if max(map(len, pair)) <= _MOST_CHARACTERS]
    equal = [False] * len(pairs)
    for at, verdict in zip(short, _compare([pairs[at] for at in short]), strict=True):
        equal[at] = verdict
    return equal


def _compare(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """In one child; in two of half the pairs each if one of them ends it, so that in the end only that one is not equal."""
    from lfm_jax.isolation.limits import LimitError, Limits, call_limited

    if not pairs:
        return []
    seconds = 20 + len(pairs) * (2 * _SECONDS_TO_PARSE + _SECONDS_TO_COMPARE)
    limits = Limits(cpu_seconds=seconds, seconds=3 * seconds, memory_bytes=_MEMORY_BYTES)
    try:
        return call_limited(verdicts, json.dumps(pairs).encode(), name="math-verify", limits=limits)
    except LimitError:
        half = len(pairs) // 2
        return [*_compare(pairs[:half]), *_compare(pairs[half:])] if half else [False]


def verdicts(data: bytes) -> list[bool]:
    """The child: `equal_mathematics` for the pairs in `data`, as JSON."""
    from math_verify import parse, verify

    def equal(answer: str, reference: str) -> bool:
        try:
            read = [parse(f"\\boxed{{{text}}}", parsing_timeout=_SECONDS_TO_PARSE) for text in (reference, answer)]
            return bool(verify(*read, timeout_seconds=_SECONDS_TO_COMPARE))
        except Exception:  # of which kind depends on what SymPy makes of the answer
            return False

    return [equal(*pair) for pair in json.loads(data)]
