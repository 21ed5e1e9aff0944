import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from lfm_jax.training.fingerprint import _index_hash, fingerprints, finish_fingerprints, leaf_paths, start_fingerprints

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint16", "bool"]


def mix(word: int) -> int:
    word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
    word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


def plain(array: np.ndarray) -> str:
    """The specification, an element at a time in Python's integers."""
    words = np.array(array, order="C").view(f"u{array.itemsize}")
    halves = []
    for seed in (0x9E3779B9, 0xBB67AE85):
        total = 0
        for index in np.ndindex(array.shape):
            place = seed + sum(mix((i + seed * (2 * axis + 3)) % 2**32) for axis, i in enumerate(index))
            total += mix(int(words[index]) ^ place % 2**32)
        halves.append(total % 2**32)
    return "{:08x}{:08x}".format(*halves)


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any bits of the dtype, NaNs and infinities among them."""
    size = jnp.dtype(dtype).itemsize
    if dtype == "bool":
        return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)
    words = np.random.default_rng(seed).integers(0, 2 ** (8 * size), shape, dtype=f"u{size}")
    return np.asarray(words).view(jnp.dtype(dtype))


def fingerprint(array: np.ndarray) -> str:
    return fingerprints(jnp.asarray(array))[""]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (7,), (5, 6), (2, 3, 4)], ids=str)
def test_it_is_what_a_plain_loop_computes(dtype, shape):
    array = random_array(dtype, shape)
    assert fingerprint(array) == plain(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_flip_changes_both_halves(dtype):
    array = random_array(dtype, (3, 5))
    before = fingerprint(array)
    bits = 1 if dtype == "bool" else 8 * array.itemsize
    seen = {before}
    for element in range(array.size):
        for bit in range(bits):
            flipped = array.copy()
            flipped.view(f"u{array.itemsize}").reshape(-1)[element] ^= 1 << bit
            after = fingerprint(flipped)
            assert after[:8] != before[:8] and after[8:] != before[8:]
            seen.add(after)
    assert len(seen) == 1 + array.size * bits


@given(st.integers(0, 2**32 - 1), st.integers(0, 47), st.integers(0, 31), st.integers(0, 47), st.integers(0, 31))
def test_no_two_bit_flips_cancel(seed, first, first_bit, second, second_bit):
    array = random_array("uint32", (6, 8), seed)
    flipped = array.copy()
    flipped.reshape(-1)[first] ^= np.uint32(1 << first_bit)
    flipped.reshape(-1)[second] ^= np.uint32(1 << second_bit)
    assert (fingerprint(flipped) == fingerprint(array)) == np.array_equal(flipped, array)


@given(st.permutations(range(24)))
def test_other_orders_of_the_same_values_differ(order):
    array = random_array("float32", (4, 6))
    other = array.reshape(-1)[np.array(order)].reshape(4, 6)
    assert (fingerprint(other) == fingerprint(array)) == (order == list(range(24)))


def test_swapping_values_that_differ_in_one_bit_is_seen():
    """A weighted sum misses it for the sign: 2**31 times any odd weight is 2**31."""
    seen = set()
    for index in np.ndindex(4, 8):
        array = np.ones((4, 8), np.float32)
        array[index] = -1
        seen.add(fingerprint(array))
    assert len(seen) == 32


@pytest.mark.parametrize(
    "change",
    [
        lambda a: np.roll(a, 1, 0), lambda a: np.roll(a, 1, 1), lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: a.T,
        lambda a: np.concatenate([a[4:], a[:4]]), lambda a: a.reshape(4, 16), lambda a: a.reshape(-1), lambda a: a[None],
    ],
)  # fmt: skip
def test_swapped_blocks_and_other_shapes_differ(change):
    array = random_array("bfloat16", (8, 8))
    assert fingerprint(change(array)) != fingerprint(array)


def test_sharding_and_number_of_devices_do_not_matter():
    array = random_array("float32", (16, 8))
    expected = plain(array)
    for shape, names in {(8,): ("fsdp",), (2, 4): ("data", "fsdp"), (4, 2): ("data", "tensor"), (1,): ("data",)}.items():
        mesh = jax.make_mesh(shape, names, devices=jax.devices()[: np.prod(shape)])
        specs = [(), (names[-1],), (None, names[-1]), names, names[::-1], (names,)]
        for spec in specs:
            placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
            assert fingerprints(placed)[""] == expected, (shape, spec)


def test_elements_beyond_32_bits_have_hashes_of_their_own():
    """A flat index would repeat after 2**32 elements, here with every fourth of the rows that are looked at."""
    hashed = jax.jit(lambda: _index_hash((1 << 16, 1 << 17), 7)[:: 1 << 13, :: 1 << 13])()
    assert len(np.unique(np.asarray(hashed))) == hashed.size == 8 * 16


def test_leaves_are_named_by_their_path():
    tree = {"params": {"layers": [{"kernel": jnp.ones(2)}, None]}, "step": jnp.int32(4)}
    assert list(leaf_paths(tree)) == ["params.layers.0.kernel", "step"]
    assert fingerprints(tree) == {"params.layers.0.kernel": plain(np.ones(2, np.float32)), "step": plain(np.array(4, np.int32))}


def test_leaves_may_be_donated_at_once():
    array = random_array("float32", (64, 64))
    expected = fingerprint(array)
    placed = jnp.array(array)
    started = start_fingerprints({"x": placed})
    jax.jit(lambda x: -x, donate_argnums=0)(placed)
    assert placed.is_deleted()
    assert finish_fingerprints(started) == {"x": expected}


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match=r"two leaves of the tree have the path 'a\.b'; rename"):
        leaf_paths({"a": {"b": 1}, "a.b": 2})


@pytest.mark.parametrize(
    ("leaf", "found"),
    [(1.0, "float"), (np.ones(3), "ndarray"), (jax.random.key(0), r"jax.Array of key<fry>"), (1j, "complex"),
     (jnp.ones(2, jnp.complex64), "jax.Array of complex64")],
)  # fmt: skip
def test_what_has_no_fingerprint_is_refused_by_name(leaf, found):
    with pytest.raises(ValueError, match=f"params.scale is a {found}: a fingerprint takes jax.Arrays of bfloat16, bool, .*uint8"):
        fingerprints({"params": {"scale": leaf}})
