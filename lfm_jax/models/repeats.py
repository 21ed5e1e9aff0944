"""Blocks that repeat, run in a loop: the compiler sees one of each kind instead of all."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.arrays import Hidden

Apply = Callable[[Any, Hidden], tuple[Hidden, jax.Array | None]]


def repeats(kinds: Sequence[Hashable]) -> list[tuple[int, int]]:
    """(period, times) of stretches that follow each other and make up the whole, each a unit of `period` kinds `times` over.

    From the front, each stretch is the one that saves the most, period * (times - 1) of what it covers; the shortest unit of
    those that save the same.

    >>> repeats("ccaccaccacacac")
    [(3, 3), (2, 2), (1, 1)]
    """
    found, start = [], 0
    while start < len(kinds):
        best = (1, 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            unit, times = kinds[start : start + period], 1
            while kinds[start + times * period : start + (times + 1) * period] == unit:
                times += 1
            if period * (times - 1) > best[0] * (best[1] - 1):
                best = (period, times)
        found.append(best)
        start += best[0] * best[1]
    return found


def in_turn(blocks: Sequence[nnx.Module], apply: Apply, hidden: Hidden) -> tuple[Hidden, list[jax.Array]]:
    """`apply` to one block after the other: (hidden, what they counted in the order of the blocks)."""
    counts = []
    for block in blocks:
        hidden, counted = apply(block, hidden)
        if counted is not None:
            counts.append(counted)
    return hidden, counts


def in_loops(blocks: Sequence[nnx.Module], kinds: Sequence[Hashable], apply: Apply, hidden: Hidden):
    """`in_turn`, the blocks of each stretch of `repeats` in a loop over its units, their parameters stacked for it.

    Args:
      kinds: of each block; those of a kind differ in the values of their arrays alone.
    """
    every, start = [], 0
    for period, times in repeats(kinds):
        stretch = blocks[start : start + period * times]
        start += len(stretch)
        if times == 1:
            hidden, counts = in_turn(stretch, apply, hidden)
            every += counts
            continue
        split = [nnx.split(block) for block in stretch]
        graphdefs = [graphdef for graphdef, _ in split[:period]]
        units = [[state for _, state in split[first : first + period]] for first in range(0, len(split), period)]

        def run_unit(hidden: Hidden, unit: list[nnx.State], graphdefs=graphdefs):
            return in_turn([nnx.merge(*parts) for parts in zip(graphdefs, unit, strict=True)], apply, hidden)

        hidden, counts = jax.lax.scan(run_unit, hidden, jax.tree.map(lambda *leaves: jnp.stack(leaves), *units))
        every += [counted[time] for time in range(times) for counted in counts]
    return hidden, every
