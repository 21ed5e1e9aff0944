"""Fingerprints of arrays, computed where the arrays are: 64 bits that any change of a value or of its place changes.

Every element becomes one 32-bit number, a mix of its bits and of its index in the whole array; the fingerprint is the sum of
these numbers modulo 2**32, twice over with different constants. So

- it depends neither on sharding, layout and number of devices nor on the order of summation (integers, not floats);
- the fingerprints of the parts of an array, each with its global indices, add up to that of the array;
- changing one element, by whatever bits, changes both sums for certain: for a given index the mix is a bijection of the bits;
- several changes at once, elements that change places among them, cancel in both sums with a chance of 2**-64.

A sum of values times weights would be cheaper and is not enough: the highest bit of a word times any odd weight is 2**31, so
swapping x with -x would go unseen.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_DTYPES = {"bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "bfloat16", "float32"}
# Two odd constants without structure in common (the fractions of the golden ratio and of the square root of 3).
_SEEDS = (0x9E3779B9, 0xBB67AE85)


def leaf_paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, e.g. "params.layers.0.conv.kernel"; None has no leaves.

    Raises:
      ValueError: two leaves have the same path, e.g. {"a": {"b": x}, "a.b": y}.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        if path in leaves:
            raise ValueError(f"two leaves of the tree have the path {path!r}; rename one of the keys")
        leaves[path] = leaf
    return leaves


def start_fingerprints(tree: Any) -> dict[str, jax.Array]:
    """Enqueues the fingerprint of every leaf and does not wait: the leaves may be donated as soon as this returns.

    One program per shape, dtype and sharding rather than one for the whole tree: leaves of a model repeat, and compiling some
    hundred of them into one program takes several times as long.

    Args:
      tree: jax.Arrays of bool, or of 8, 16 or 32 bit integers or floats; of any shape, also () and empty. On several processes
        every process takes part.

    Returns:
      By path (`leaf_paths`), the two sums, [2] uint32, replicated.

    Raises:
      ValueError: a leaf is no jax.Array, or of another dtype.
    """
    leaves = leaf_paths(tree)
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array) or leaf.dtype.name not in _DTYPES:
            found = f"jax.Array of {leaf.dtype.name}" if isinstance(leaf, jax.Array) else type(leaf).__name__
            raise ValueError(f"{path} is a {found}: a fingerprint takes jax.Arrays of {', '.join(sorted(_DTYPES))}")
    started = {}
    for path, leaf in leaves.items():
        started[path] = _sums(leaf)
        if len(leaf.devices()) > 1 and next(iter(leaf.devices())).platform == "cpu":
            # Simulated devices share one pool of threads, and many programs that each wait for all of them starve one another.
            started[path].block_until_ready()
    return started


def finish_fingerprints(started: dict[str, jax.Array]) -> dict[str, str]:
    """Waits for the sums of `start_fingerprints`; 16 hexadecimal digits by path."""
    return {path: "".join(f"{int(half):08x}" for half in sums) for path, sums in jax.device_get(started).items()}


def fingerprints(tree: Any) -> dict[str, str]:
    """The fingerprint of every leaf, 16 hexadecimal digits by path; arguments and errors as of `start_fingerprints`."""
    return finish_fingerprints(start_fingerprints(tree))


@jax.jit
def _sums(array: jax.Array) -> jax.Array:
    return local_sums(array)


def local_sums(array: jax.Array) -> jax.Array:
    """The two sums of an array's fingerprint, [2] uint32; inside a program, and of one device's part inside `shard_map`."""
    words = array if array.dtype == jnp.bool_ else lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])
    words = words.astype(jnp.uint32)
    return jnp.stack([jnp.sum(_mix(words ^ _index_hash(array.shape, seed)), dtype=jnp.uint32) for seed in _SEEDS])


def _index_hash(shape: tuple[int, ...], seed: int) -> jax.Array:
    """A hash of every element's index. Axes are hashed one by one and added, so no flat index can exceed 32 bits."""
    hashed = jnp.full(shape, seed, jnp.uint32)
    for axis in range(len(shape)):
        offset = seed * (2 * axis + 3) % 2**32
        hashed += _mix(lax.broadcasted_iota(jnp.uint32, shape, axis) + np.uint32(offset))
    return hashed


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit of the input moves about half of the output's (fmix32 of MurmurHash3)."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
