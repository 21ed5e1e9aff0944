"""Whether devices that should hold the same bits do: a device that miscomputes, or whose memory does, is named.

Every leaf of a state that some devices hold copies of is summed up on each of them (`fingerprint`), and the sums are compared:
exactly, there is no tolerance. What only one device holds has nothing to be compared with. Where `data` replicas split the state
among themselves that is most of it; see `copied_bytes`.
"""

import collections
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lfm_jax.training.fingerprint import leaf_paths, local_sums


class SilentCorruption(RuntimeError):
    """Devices do not hold, or do not compute, the same where they should."""


class Odd(NamedTuple):
    """A leaf's shard whose copies differ. devices: those in the minority, or all holders where there is none."""

    path: str
    shard: tuple[slice, ...]
    devices: list[jax.Device]
    holders: int


def gathered_sums(leaves: Sequence[jax.Array], mesh: Mesh) -> np.ndarray:
    """The two sums of each device's part of each array, [arrays, devices in the order of the mesh, 2] uint32, on every host."""
    sums = [_sums_of(leaf.sharding)(leaf) for leaf in leaves]
    return np.asarray(_gathered(NamedSharding(mesh, PartitionSpec()))(sums))


def differing_devices(first: np.ndarray, second: np.ndarray, mesh: Mesh) -> list[jax.Device]:
    """Of two results of `gathered_sums`, the devices whose rows are not the same."""
    return [device for index, device in enumerate(mesh.devices.flat) if np.any(first[:, index] != second[:, index])]


def odd_replicas(tree: Any, mesh: Mesh) -> list[Odd]:
    """The shards whose copies are not the same; empty if all is well. Every process gets the same answer."""
    copied = {path: leaf for path, leaf in leaf_paths(tree).items() if leaf.size and _copies(leaf.sharding, leaf.shape) > 1}
    if not copied:
        return []
    odd = []
    for (path, leaf), of_leaf in zip(copied.items(), gathered_sums(list(copied.values()), mesh), strict=True):
        odd += _odd_of(path, leaf, dict(zip(mesh.devices.flat, map(tuple, of_leaf.tolist()), strict=True)))
    return odd


def check_replicas(state: Any, mesh: Mesh, step: int) -> None:
    """Raises SilentCorruption, with shard, devices and hosts, if copies of a part of the state differ after `step`."""
    odd = odd_replicas(state, mesh)
    if odd:
        raise SilentCorruption(
            f"after step {step} devices that should hold the same do not: {'; '.join(map(describe, odd[:5]))}"
            f"{f'; and {len(odd) - 5} more' if len(odd) > 5 else ''}. The checkpoints were compared before they were written. "
            "Take the host out of the run, or test it; the same command resumes from the newest."
        )


def describe(odd: Odd) -> str:
    """In words."""
    shard = ", ".join(f"{part.start or 0}:{'' if part.stop is None else part.stop}" for part in odd.shard)
    share = f"1 of {odd.holders} copies" if len(odd.devices) == 1 else f"{len(odd.devices)} of {odd.holders} copies"
    return f"{odd.path}[{shard}] on {describe_devices(odd.devices)} ({share})"


def describe_devices(devices: list[jax.Device]) -> str:
    """By number and process."""
    return ", ".join(f"device {device.id} of process {device.process_index}" for device in devices)


def copied_bytes(tree: Any) -> tuple[int, int]:
    """(bytes of which there is more than one copy, bytes in all), each counted once."""
    size = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
    leaves = jax.tree.leaves(tree)
    return sum(size(leaf) for leaf in leaves if _copies(leaf.sharding, leaf.shape) > 1), sum(map(size, leaves))


def _copies(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> int:
    indices = {_key(index) for index in sharding.devices_indices_map(shape).values()}
    return sharding.num_devices // len(indices)


def _key(index: tuple[slice, ...]) -> tuple:
    return tuple((part.start, part.stop) for part in index)


def _odd_of(path: str, leaf: jax.Array, sums: dict[jax.Device, tuple[int, ...]]) -> list[Odd]:
    holders = collections.defaultdict(list)
    shards = leaf.sharding.devices_indices_map(leaf.shape)
    for device, index in shards.items():
        holders[_key(index)].append(device)
    found = []
    for devices in holders.values():
        votes = collections.Counter(sums[device] for device in devices)
        if len(votes) > 1:
            (usual, most), (_, next_most) = votes.most_common(2)
            minority = [device for device in devices if sums[device] != usual] if most > next_most else devices
            found.append(Odd(path, shards[devices[0]], minority, len(devices)))
    return found


@functools.cache
def _sums_of(sharding: NamedSharding):
    mesh = sharding.mesh
    everywhere = PartitionSpec(mesh.axis_names)
    on_device = lambda part: local_sums(part)[None]
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=sharding.spec, out_specs=everywhere, check_vma=False))


@functools.cache
def _gathered(sharding: NamedSharding):
    return jax.jit(lambda sums: jnp.stack(sums), out_shardings=sharding)
