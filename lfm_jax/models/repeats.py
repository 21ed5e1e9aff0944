"""Blocks that repeat, run in a loop: the compiler sees one of each kind instead of all."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.arrays import Hidden

Apply = Callable[[Any, Hidden, Any], tuple[Hidden, Any]]  # (block, hidden, what it is given): hidden, and what it tells


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


def in_turn(blocks: Sequence[nnx.Module], given: Sequence[Any], apply: Apply, hidden: Hidden) -> tuple[Hidden, list[Any]]:
    """`apply` to one block after the other: (hidden, what they told in the order of the blocks, without Nones).

    Args:
      given: a tree of arrays for each block, or None.
    """
    told = []
    for block, own in zip(blocks, given, strict=True):
        hidden, found = apply(block, hidden, own)
        if found is not None:
            told.append(found)
    return hidden, told


def in_loops(
    blocks: Sequence[nnx.Module], given: Sequence[Any], kinds: Sequence[Hashable], apply: Apply, hidden: Hidden
) -> tuple[Hidden, list[Any]]:
    """`in_turn`, the blocks of each stretch of `repeats` in a loop over its units, their parameters stacked for it.

    Args:
      kinds: of each block; those of a kind differ in the values of their arrays, and of what they are given, alone.
    """
    every, start = [], 0
    for period, times in repeats(kinds):
        stretch, own = (each[start : start + period * times] for each in (blocks, given))
        start += len(stretch)
        if times == 1:
            hidden, told = in_turn(stretch, own, apply, hidden)
            every += told
            continue
        graphdefs, states = zip(*(nnx.split(block) for block in stretch), strict=True)
        units = [(states[first : first + period], own[first : first + period]) for first in range(0, len(stretch), period)]

        def run_unit(hidden: Hidden, unit: tuple[Sequence[nnx.State], Sequence[Any]], graphdefs=graphdefs[:period]):
            states, own = unit
            return in_turn([nnx.merge(*parts) for parts in zip(graphdefs, states, strict=True)], own, apply, hidden)

        hidden, told = jax.lax.scan(run_unit, hidden, jax.tree.map(lambda *leaves: jnp.stack(leaves), *units))
        every += [jax.tree.map(lambda leaf, time=time: leaf[time], found) for time in range(times) for found in told]
    return hidden, every
