"""The kernels as they run on the GPU or TPU that is there, each implementation beside the others.

    python run.py --config=configs/benchmarks/kernels.py:gpu --workdir=workdirs/kernels_gpu
    python run.py --config=configs/benchmarks/kernels.py:tpu --workdir=workdirs/kernels_tpu

Two to three minutes on an H200 before grouped matmuls were among them; `:tpu` has not been run. Seconds of the forward pass and
of both passes in bfloat16, of rows of one document and of packed rows; how much of them a device needs that moves every byte once
and does the FLOPs at its best rate (both rates are measured in the same run); and the largest relative error of output and
gradients against XLA in float32. What no TPU is needed for is in `attention.py`, `short_conv.py` and `grouped_matmul.py` beside
this file. Without an argument: small shapes, for a CPU. Recorded in docs/benchmarks/kernels.md, grouped matmuls on a CPU in
docs/benchmarks/grouped_matmul.md.
"""

from ml_collections import ConfigDict

_KERNELS = {
    "gpu": {
        "attention": ("cudnn", "pallas", "reference"),
        "short_conv": ("reference", "pallas"),
        "grouped_matmul": ("reference", "blocks"),
    },
    "tpu": {
        "attention": ("splash", "reference"),
        "short_conv": ("pallas", "reference"),
        "grouped_matmul": ("pallas", "reference"),
    },
}


def get_config(argument: str = "") -> ConfigDict:
    """For a "gpu", a "tpu", or the CPU."""
    if argument in _KERNELS:
        shapes = {
            "platform": argument, "presets": ("lfm2_350m", "lfm2_1_2b"), "tokens": 32_768, "seqs": (4096, 32_768),
            "experts": ((32, 4, 2048, 1792),), "expert_tokens": 512, **_KERNELS[argument],
        }  # fmt: skip
    elif not argument:
        shapes = {
            "platform": "cpu", "presets": ("nano",), "tokens": 4096, "seqs": (1024,), "document_length": 256, "dtype": "float32",
            "attention": ("rows", "reference"), "short_conv": ("reference",), "matmul": 1024, "read_bytes": 2**24,
            "grouped_matmul": ("blocks", "reference"), "experts": ((32, 4, 192, 128), (8, 2, 256, 512)),
            "expert_tokens": 2048,
        }  # fmt: skip
    else:
        raise ValueError(f"unknown argument {argument!r}; there are {', '.join(_KERNELS)}, and none for a CPU")
    return ConfigDict({"experiment": "benchmarks.kernels", **shapes})
