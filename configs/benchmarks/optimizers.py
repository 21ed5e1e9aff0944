"""Muon against AdamW on real text, each at its best learning rate: held-out loss, and tokens to the same loss.

    python run.py --config=configs/benchmarks/optimizers.py --workdir=workdirs/optimizers

A grid of learning rates for each, then the best with three seeds and with shorter runs, on a hybrid of half a million parameters.
The text is public-domain books in the folder that the environment variable LFM_JAX_DATA names (`books/train-00.jsonl.zst` and
`books/validation.jsonl.zst`), or else Python's standard library. The argument is the size, 1 if there is none: 2 has twice the
width, twice the depth and eight times the steps, about 60 times the work; 1 takes a quarter of an hour of two idle cores. Expect
that Muon needs half the tokens (docs/benchmarks/optimizers.md).
"""

import os

from ml_collections import ConfigDict

_SCHEDULE = {"kind": "wsd", "warmup_steps": 20, "decay_share": 0.4}
_RATES = (4e-3, 8e-3, 16e-3, 32e-3)


def get_config(argument: str = "1") -> ConfigDict:
    """The comparison at a size."""
    size = int(argument or "1") if (argument or "1").isdigit() else 0
    if size < 1:
        raise ValueError(f"{argument!r} is no size; give a whole number from 1")
    folder = os.environ.get("LFM_JAX_DATA")
    books = {"source": f"{folder}/books/train-00.jsonl.zst", "held_out_source": f"{folder}/books/validation.jsonl.zst"}
    arm = lambda name, rates, shorter=(), **optimizer: {
        "name": name, "rates": rates, "shorter": shorter, "optimizer": {"schedule": _SCHEDULE, **optimizer},
    }  # fmt: skip
    steps = 200 * size**3
    return ConfigDict(
        {
            "experiment": "benchmarks.optimizers",
            "arms": (
                arm("adamw", _RATES),
                arm("muon", (*_RATES, 64e-3), (0.35, 0.5, 0.75), matrices="muon"),
                arm("muon_cautious", (8e-3,), matrices="muon", cautious_decay=True),
            ),
            "model": {
                "vocab_size": 1024, "embed_dim": 96 * size, "layer_types": ("conv", "conv", "full_attention", "conv") * size,
                "num_heads": 3 * size, "num_kv_heads": size, "head_dim": 32, "mlp_dim": 256 * size,
            },
            "data": books if folder else {"source": "stdlib"},
            "tokenizer": {"vocab_size": 1024, "train_bytes": 1 << 22},
            "loader": {"seq_len": 128, "batch_size": 8},
            "evaluation_batches": 32,
            "train": {
                "steps": steps, "log_every": 10, "evaluate_every": steps // 5, "checkpoint_every": steps,
                "keep_checkpoints": 1,
            },
        }
    )  # fmt: skip
