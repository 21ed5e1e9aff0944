"""A scaling sweep on two CPU cores, 81k to 1.2M parameters, 5 to 1,280 tokens for each, on text whose entropy is known.

    python run.py --config=configs/scaling_sweep.py --workdir=workdirs/scaling_sweep

The text is drawn from a seeded source whose every probability is known (data_pipelines/sources/known_entropy.py), so that the
constant E of the laws can be checked, and no token comes twice. Each size is trained once at a constant rate; for each budget a
branch decays from that trunk (warm-up-stable-decay, the last 20 % with 1 - sqrt). The learning rate of matrices goes as 1 /
width, the batch as the square root of N, the warm-up is a token for each parameter outside of the embedding. Three seeds of the
smallest size say how large the noise is; an attention-only twin of as many parameters stands beside it.

Held out before fitting: the largest M of the two smallest sizes, and the largest size at M = 20. Gives scaling_sweep.md (laws
with errors on what was held out beside the intervals that the noise alone would give, E beside the entropy, optima, pairs of
runs), scaling_sweep.png, points.jsonl, which configs/scaling_fit.py reads, and runs.jsonl, a line for each run. The command can
be given again at any time: what is done is not run again, and what was stopped goes on; nor is what a runs.jsonl from elsewhere
has, with `--config.recorded=FILE`. Recorded: docs/scaling_sweep.md, two and a half hours of two cores.

The same in minutes, with models too small and too short to follow any law: `--config=configs/scaling_sweep.py:quick`. As jobs,
one for each trunk, of Slurm or on TPU slices (docs/launching.md): the text is written to a folder that all of them see, and what
to type is said; the first command, with that folder as its workdir, fits them in the end.

    python run.py --config=configs/scaling_sweep.py --workdir=workdirs/jobs --config.folder=gs://BUCKET/sweep \
        --config.render=true
"""

from typing import Any

from ml_collections import ConfigDict

# Halvings and doublings of the rule's learning rate are tried on the smallest size and on one of 3.7 times its parameters.
_RATES = (0.5, 2.0)
_DOUBLINGS = (5, 10, 20, 40, 80, 160, 320, 640, 1280)


def get_config(argument: str = "") -> ConfigDict:
    """argument: none, or "quick"."""
    if argument not in ("", "quick"):
        raise ValueError(f"{argument!r}: this config takes no argument but 'quick'")
    return ConfigDict({"experiment": "scaling_sweep", **(_quick() if argument else _whole())})


def _whole() -> dict[str, Any]:
    return {
        "trunks": (
            _trunk(48, 3, 10, 1280, held_out=(1280,), apart=(20,)),
            *(_trunk(48, 3, 10, 160, seed=seed) for seed in (1, 2)),
            *(_trunk(48, 3, 20, 20, rate=rate) for rate in _RATES),
            _trunk(64, 3, 10, 320, held_out=(320,)),
            _trunk(64, 6, 10, 80),
            *(_trunk(64, 6, 10, 10, rate=rate) for rate in _RATES),
            _trunk(96, 6, 5, 20),
            _trunk(128, 6, 5, 20, held_out=(20,)),
            _trunk(48, 3, 20, 80, attention_only=True),
        ),
        # Of each at least three sizes. Among them 48x3 at M = 160 and 640, 64x3 at 320, 64x6 at 80 and 128x6 at 5.
        "budgets": (6.2e12, 2.5e13, 4.15e13),
        "train_tokens": 104_000_000,
        "held_out_tokens": 1 << 18,
        "pretrain": _pretrain(seq_len=128, rows=16),
    }


def _quick() -> dict[str, Any]:
    """The shape of the whole."""
    pretrain = _pretrain(seq_len=32, rows=8)
    pretrain["model"] |= {"embed_dim": 16, "head_dim": 8, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16}
    return {
        "trunks": (
            _trunk(8, 2, 20, 160, held_out=(160,), apart=(20,)),
            _trunk(8, 2, 20, 40, seed=1),
            _trunk(16, 2, 10, 40, held_out=(40,)),
            _trunk(16, 3, 10, 40),
        ),
        "source": {"longest": 31},
        "train_tokens": 400_000,
        "held_out_tokens": 1 << 13,
        "pretrain": pretrain,
        "draws": 5,
    }


def _trunk(embed_dim: int, layers: int, first: float, last: float, **more: Any) -> dict[str, Any]:
    """With a branch at each doubling of M from the first to the last."""
    multipliers = tuple(multiplier for multiplier in _DOUBLINGS if first <= multiplier <= last)
    return {"embed_dim": embed_dim, "layers": layers, "multipliers": multipliers, **more}


def _pretrain(seq_len: int, rows: int) -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": 256, "embed_dim": 64, "layer_types": ("conv", "conv", "full_attention"), "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 176, "context_length": seq_len,
        },
        "tokens_from": ("(the text of the sweep)",),
        # Documents are independent draws, so nothing is lost by reading one file after the other.
        "loader": {"seq_len": seq_len, "batch_size": rows, "window_files": 1},
        "optimizer": {"learning_rate": 4e-3, "schedule": {"kind": "wsd", "decay_share": 0.2}},
        "train": {"steps": 1000, "log_every": 50, "evaluate_every": 1 << 30, "checkpoint_every": 500, "keep_checkpoints": 1},
        "evaluation_batches": 1,
        "ngram_tokens": None,
        "export": None,
    }  # fmt: skip
