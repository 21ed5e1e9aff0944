"""Copies that differ in one bit are found, whatever holds them, and the device is named; copies that do not are left in peace."""

import collections
import functools
import itertools
import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding, PartitionSpec

from lfm_jax.models import Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import (
    LossConfig,
    OptimizerConfig,
    SilentCorruption,
    init_state,
    make_optimizer,
    make_train_step,
    next_token_objective,
    place_batch,
)
from lfm_jax.training.replicas import check_replicas, copied_bytes, differing_devices, gathered_sums, odd_replicas

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
# Of each dtype a leaf in every way that a mesh of data x fsdp x tensor can hold it.
SPECS = {
    "whole": PartitionSpec(), "fsdp": PartitionSpec("fsdp"), "tensor": PartitionSpec(None, "tensor"),
    "data": PartitionSpec("data"), "two": PartitionSpec("fsdp", "tensor"), "joined": PartitionSpec(("fsdp", "data")),
    "all": PartitionSpec(("data", "fsdp"), "tensor"),
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "int32", "uint8", "float16", "bool")


@functools.cache
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@functools.cache
def tree():
    """{"dtype": {"spec": array}}, with scalars and a leaf without elements among them."""
    rng = np.random.default_rng(0)
    place = lambda array, spec: jax.device_put(array, NamedSharding(mesh(), spec))
    normal = lambda shape: jnp.asarray(rng.normal(0, 50, shape), jnp.float32)
    values = lambda dtype, shape=(8, 4): normal(shape) > 0 if dtype == "bool" else abs(normal(shape)).astype(dtype)
    leaves = {dtype: {name: place(values(dtype), spec) for name, spec in SPECS.items()} for dtype in DTYPES}
    scalars = {dtype: place(values(dtype, ()), PartitionSpec()) for dtype in DTYPES}
    return {**leaves, "scalars": scalars, "empty": place(jnp.zeros((0, 4)), PartitionSpec())}


def flipped(leaf, devices, element, bit):
    """The array, with one bit of one element of these devices' parts turned over."""
    arrays = []
    for shard in leaf.addressable_shards:
        part = np.array(shard.data)
        if shard.device in devices:
            words = part.view(WORDS[part.dtype.itemsize]).reshape(-1)
            words[element % words.size] ^= words.dtype.type(1 << bit % (1 if part.dtype == bool else 8 * part.dtype.itemsize))
            part = words.view(part.dtype).reshape(part.shape)
        arrays.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def by_hand(leaves):
    """[(path, shard, ids of the devices in the minority)], from the bytes of every device's part."""
    found = []
    for path, leaf in leaves.items():
        holders = collections.defaultdict(list)
        for shard in leaf.addressable_shards:
            holders[str(shard.index)].append((np.asarray(shard.data).tobytes(), shard.device.id))
        for index, copies in holders.items():
            votes = collections.Counter(content for content, _ in copies).most_common()
            if len(votes) > 1:
                tie = votes[0][1] == votes[1][1]
                found.append((path, index, sorted(device for content, device in copies if tie or content != votes[0][0])))
    return sorted(found)


def ours(leaves):
    return sorted((odd.path, str(odd.shard), sorted(device.id for device in odd.devices)) for odd in odd_replicas(leaves, mesh()))


def flat(leaves):
    return {f"{first}.{second}": leaf for first in (*DTYPES, "scalars") for second, leaf in leaves[first].items()}


def test_copies_that_are_the_same_are_left_in_peace():
    assert odd_replicas(tree(), mesh()) == []
    assert odd_replicas({"nothing": ()}, mesh()) == []


@pytest.mark.parametrize("path", sorted(flat(tree())))
def test_a_flipped_bit_is_found_wherever_there_is_another_copy(path):
    """Any bit, element and device; where each device holds a part of its own there is nothing to compare."""
    rng = np.random.default_rng(sum(map(ord, path)))
    leaf = flat(tree())[path]
    copies = collections.Counter(str(shard.index) for shard in leaf.addressable_shards)
    for _ in range(4):
        shard = leaf.addressable_shards[rng.integers(8)]
        hurt = {path: flipped(leaf, [shard.device], int(rng.integers(32)), int(rng.integers(32)))}
        holders = copies[str(shard.index)]
        expected = by_hand(hurt)
        assert len(expected) == (holders > 1)
        assert ours(hurt) == expected
        if holders > 2:
            (odd,) = odd_replicas(hurt, mesh())
            assert odd.devices == [shard.device] and odd.holders == holders and str(odd.shard) == str(shard.index)


def test_every_bit_of_a_number_counts():
    leaf = tree()["float32"]["whole"]
    for bit in range(32):
        (odd,) = odd_replicas({"a": flipped(leaf, [jax.devices()[3]], 5, bit)}, mesh())
        assert odd.devices == [jax.devices()[3]]


@pytest.mark.parametrize(("wrong", "named"), [(1, 1), (2, 2), (3, 3), (4, 8), (5, 3), (7, 1)])
def test_the_fewer_are_named_and_of_a_tie_all(wrong, named):
    """Eight devices hold it, and `wrong` of them alike something else."""
    hurt = {"a": flipped(tree()["int32"]["whole"], jax.devices()[:wrong], 7, 3)}
    (odd,) = odd_replicas(hurt, mesh())
    assert (len(odd.devices), odd.holders) == (named, 8) and ours(hurt) == by_hand(hurt)


def test_of_three_opinions_the_largest_is_usual():
    leaf = flipped(flipped(tree()["float32"]["whole"], jax.devices()[:2], 0, 1), jax.devices()[2:3], 3, 9)
    (odd,) = odd_replicas({"a": leaf}, mesh())
    assert {device.id for device in odd.devices} == {0, 1, 2}


def test_shards_of_one_leaf_are_told_apart():
    leaf = tree()["float32"]["fsdp"]
    lower, upper = (next(shard for shard in leaf.addressable_shards if shard.index[0].start == start) for start in (0, 4))
    hurt = {"a": flipped(leaf, [lower.device, upper.device], 2, 30)}
    found = odd_replicas(hurt, mesh())
    assert [(odd.shard[0].start, odd.devices) for odd in found] == [(0, [lower.device]), (4, [upper.device])]


def test_the_error_names_step_leaf_shard_device_and_process():
    hurt = {"params": {"kernel": flipped(tree()["bfloat16"]["fsdp"], [jax.devices()[6]], 1, 14)}}
    message = (
        r"after step 12 devices that should hold the same do not: params\.kernel\[4:8, 0:\] on device 6 of process 0 "
        r"\(1 of 4 copies\)\. The checkpoints were compared before they were written"
    )
    with pytest.raises(SilentCorruption, match=message):
        check_replicas(hurt, mesh(), 12)
    check_replicas(tree(), mesh(), 12)


def test_the_error_is_short_whatever_is_broken():
    hurt = {str(number): flipped(tree()["float32"]["whole"], [jax.devices()[0]], number, 0) for number in range(8)}
    with pytest.raises(SilentCorruption, match=r"1 of 8 copies\); and 3 more\. The"):
        check_replicas(hurt, mesh(), 1)


def test_bytes_with_a_copy_are_counted_once():
    size = lambda leaf: leaf.size * leaf.dtype.itemsize
    alone = lambda path: path.endswith(".all")
    copied = sum(size(leaf) for path, leaf in flat(tree()).items() if not alone(path))
    assert copied_bytes(flat(tree())) == (copied, copied + sum(size(leaf) for path, leaf in flat(tree()).items() if alone(path)))


def test_devices_with_other_sums_are_named():
    leaf = tree()["float32"]["all"]
    first = gathered_sums([leaf, tree()["scalars"]["int32"]], mesh())
    assert first.shape == (2, 8, 2) and first.dtype == np.uint32
    second = gathered_sums([flipped(leaf, [jax.devices()[2], jax.devices()[7]], 0, 0), tree()["scalars"]["int32"]], mesh())
    assert differing_devices(first, second, mesh()) == [jax.devices()[2], jax.devices()[7]]
    assert differing_devices(first, first, mesh()) == []


@pytest.mark.parametrize(
    "config", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, fsdp=1, context=2, tensor=2)], ids=["fsdp", "context"]
)
def test_no_false_alarm_after_steps(config):
    """What the devices compute of each leaf apart is the same to the bit, with moments in bfloat16, too."""
    placed = make_mesh(config)
    model = ModelConfig(
        vocab_size=32, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24
    )
    functions = functional(lambda rngs: Decoder(model, rngs=rngs))
    optimizer = make_optimizer(OptimizerConfig(moment_dtype="bfloat16"), 10)
    step = make_train_step(functions, optimizer, next_token_objective(LossConfig()), placed, seed=0)
    state, rng = init_state(functions, optimizer, placed, 0), np.random.default_rng(0)
    for number in range(4):
        tokens = rng.integers(0, 32, (8, 16), dtype=np.int32)
        ones = np.ones_like(tokens)
        batch = {
            "tokens": tokens, "targets": tokens, "segment_ids": ones, "positions": np.cumsum(ones, 1, dtype=np.int32) - 1,
            "loss_mask": ones.astype(np.float32),
        }  # fmt: skip
        batch = place_batch(batch, placed)
        state, _ = step(state, batch)
        check_replicas(state, placed, number + 1)
    copied = [leaf for leaf in jax.tree.leaves(state) if leaf.sharding.is_fully_replicated]
    hurt = state._replace(step=flipped(state.step, [jax.devices()[1]], 0, 20))
    with pytest.raises(SilentCorruption, match=r"after step 5 .* step\[\] on device 1 of process 0 \(1 of 8 copies\)\."):
        check_replicas(hurt, placed, 5)
    assert copied


# Four devices each; a device of the second process holds something else.
CODE = """
import json, runpy, sys
import jax
port, process = sys.argv[1:]
sys.path.insert(0, "tests")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process), heartbeat_timeout_seconds=30)
single = runpy.run_path("tests/training/test_replicas.py")
leaves, odd = single["flat"](single["tree"]()), []
for path in ("float32.whole", "bfloat16.fsdp", "scalars.int32"):
    hurt = single["flipped"](leaves[path], [jax.devices()[6]], 3, 5)
    odd += [single["odd_replicas"]({path: hurt}, single["mesh"]())]
assert single["odd_replicas"](leaves, single["mesh"]()) == []
named = lambda each: [[device.id, device.process_index] for device in each.devices]
print(json.dumps([[each.path, str(each.shard), named(each)] for found in odd for each in found]))
"""


def test_two_processes_come_to_the_same_answer():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", CODE, port, str(index)], cwd=ROOT, **pipes) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    assert first == second
    assert [path for path, *_ in first] == ["float32.whole", "bfloat16.fsdp", "scalars.int32"]
    (device,) = {tuple(itertools.chain(*devices)) for _, _, devices in first}
    assert device[1] == 1
