"""What comparing the devices' copies of the state costs beside training, and how much of a state has copies at all.

    python run.py --config=configs/benchmarks/replica_check.py --workdir=workdirs/replica_check

Times a step of nano and `check_replicas` on its state in turns, on each mesh that the devices suffice for; as the worst case also
on a state that every device holds all of. From shapes alone it counts, for every preset on the slice that it is planned for, the
bytes that more than one device holds. Minutes. A CPU is one device; to see eight of them:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python run.py --config=configs/benchmarks/replica_check.py \
        --workdir=workdirs/replica_check

The target is less than 0.5 % of the time with a check every 100 steps (docs/benchmarks/replica_check.md).
"""

from ml_collections import ConfigDict

# As in docs/benchmarks/pod_plan.md.
_PLANS = (
    ("lfm2_5_230m", "v5e:16x16", 1), ("lfm2_350m", "v5e:16x16", 1), ("lfm2_700m", "v5e:16x16", 1), ("lfm2_1_2b", "v5e:16x16", 16),
    ("lfm3_1_7b", "v5e:16x16", 16), ("lfm2_5_230m", "v5p:8x8x8", 1), ("lfm2_350m", "v5p:8x8x8", 1), ("lfm2_700m", "v5p:8x8x8", 1),
    ("lfm2_1_2b", "v5p:8x8x8", 1), ("lfm3_1_7b", "v5p:8x8x8", 1), ("lfm2_2_6b", "v5p:8x8x8", 1), ("lfm2_8b_a1b", "v5p:8x8x8", 1),
    ("lfm2_5_8b_a1b", "v5p:8x8x8", 1), ("lfm2_24b_a2b", "v5p:8x8x8", 8),
)  # fmt: skip


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}")
    plans = tuple({"preset": name, "topology": slice_, "mesh": {"data": -1, "fsdp": fsdp}} for name, slice_, fsdp in _PLANS)
    meshes = ({"fsdp": 1}, {"fsdp": 4, "context": 2}, {"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2})
    return ConfigDict(
        {"experiment": "benchmarks.replica_check", "preset": "nano", "rows": 16, "seq": 256, "meshes": meshes, "plans": plans}
    )
