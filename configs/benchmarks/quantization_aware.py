"""What four bits cost a trained model, and how much of that a short training that knows of them wins back.

    python run.py --config=configs/benchmarks/quantization_aware.py --workdir=workdirs/quantization_aware \
        --config.init_from=workdirs/quickstart

Trains the model of `init_from` for another 100 steps: in floating point, and with `compute.file_format` q4_0 (GGUF's Q4_0) and
8da4w (ExecuTorch's weights of 4 bits), each with three seeds. Then measures each in floating point and rounded to either format,
and, where xllamacpp is installed, the files that come of it in llama.cpp. Writes quantization_aware.md. The training in floating
point is there because training on helps by itself. Expect that Q4_0 costs the quickstart's model 0.0011 bits per byte, and half
of it after training with it (docs/benchmarks/quantization_aware.md); ten minutes of two cores.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict(
        {
            "experiment": "benchmarks.quantization_aware",
            "data": {"source": "stdlib"},
            "loader": {"seq_len": 256, "batch_size": 8, "seed": 1},
            "optimizer": {"learning_rate": 1e-3, "schedule": {"kind": "wsd", "warmup_steps": 10, "decay_share": 0.5}},
            "train": {"steps": 100, "log_every": 10, "evaluate_every": 100, "checkpoint_every": 100},
        }
    )
