"""What the device that is there can do at best: the rates that floors are computed of."""

import statistics
import time
from collections.abc import Callable
from typing import Any

_CALLS = 4  # started without waiting for one another, so that a device never waits for the host


def seconds_of(call: Callable[..., Any], *arguments: Any, least_seconds: float) -> list[float]:
    """Seconds of one call, by turn, after one that is not timed; turns until so much time is over, and three at least."""
    import jax

    jax.block_until_ready(call(*arguments))
    turns, end = [], time.perf_counter() + least_seconds
    while len(turns) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        jax.block_until_ready([call(*arguments) for _ in range(_CALLS)])
        turns.append((time.perf_counter() - begin) / _CALLS)
    return turns


def matmul_flops_per_second(size: int, dtype: str) -> float:
    """Of the fastest of some products in a row; random numbers, since constant ones take less power."""
    import jax

    draw = lambda seed: jax.random.normal(jax.random.key(seed), (size, size), dtype)
    return 2 * size**3 / min(seconds_of(jax.jit(lambda a, b: a @ b), draw(0), draw(1), least_seconds=2.0))


def read_bytes_per_second(size: int, dtype: str) -> float:
    """At which a matrix of so many bytes is read again and again: by the median of its products with a vector."""
    import jax

    columns = 4096
    rows = max(1, size // (columns * jax.numpy.dtype(dtype).itemsize))
    matrix = jax.random.normal(jax.random.key(0), (rows, columns), dtype)
    vector = jax.random.normal(jax.random.key(1), columns, dtype)
    product = jax.jit(lambda matrix, vector: matrix @ vector)
    return matrix.nbytes / statistics.median(seconds_of(product, matrix, vector, least_seconds=0.5))
