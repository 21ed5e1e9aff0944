"""Pre-training recipes of all architectures: 4k context, batch in tokens, schedule, mesh.

On a pod slice, every host runs the same command:

    python run.py --config=configs/pretrain.py:lfm2_350m --workdir=gs://BUCKET/lfm2_350m \
        --config.data.source=gs://BUCKET/text --config.tokenizer_from=gs://BUCKET/tokenizer

Layouts are those that fit 256 chips of v5e, with 16 GiB each: of lfm3_1_7b and lfm2_2_6b 16 devices share a copy of the weights,
and take two micro-batches; of the mixtures all devices do, compute everything again and have the layers in a loop. A v5p has room
for a whole copy of all but lfm2_24b_a2b and is faster so, with as many micro-batches as it takes (docs/benchmarks/pod_plan.md):

    --config.mesh.data=-1 --config.mesh.fsdp=1 --config.compute.remat=none --config.compute.scan_layers=False \
        --config.train.accumulation=4

The argument names the architecture; without it this is `nano`, which a laptop trains on Python's standard library in an hour:

    python run.py --config=configs/pretrain.py --workdir=workdirs/nano

What is published of LFM2's training: 10T tokens at 4k context (12T for the mixtures of experts), of LFM2.5 28T (230M: 19T,
8B-A1B: 38T); nothing of LFM3's, and neither learning rates nor batch sizes of any. Those here are other small models' (see
`_RECIPES`), are not tuned for this architecture, and are a place to start from. Mixtures of tokenized texts (`tokens_from`),
other weights and longer rows from a step on (`loader.stages`): docs/data.md. Mid-training at 32k on another mesh is a run of its
own, with `init_from`.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lfm_jax.models import preset

SEQ_LEN = 4096
_MILLION, _TRILLION = 2**20, 10**12


class _Recipe(NamedTuple):
    """learning_rate: at its peak. batch: tokens of a step, in `accumulation` micro-batches. tokens: of the whole run.

    fsdp: devices that share a copy of the weights, -1 for all; 1 where a TPU v5e has room for the whole.
    remat, scan_layers: see ComputeConfig.
    """

    learning_rate: float
    batch: int
    tokens: int
    fsdp: int = 1
    accumulation: int = 1
    remat: str = "none"
    scan_layers: bool = False


_ON_ALL = {"fsdp": -1, "remat": "full", "scan_layers": True}
# 3e-3 and a million tokens: SmolLM-135M and -360M (Hugging Face, 2024). 5e-4 and two million: SmolLM2-1.7B (Ben Allal et al.
# 2025); 2e-4: SmolLM3-3B (2025). Between these sizes by a straight line in the logarithms. 4e-4, four million tokens and weight
# decay 0.1: OLMoE-1B-7B (Muennighoff et al. 2024), whose 1.3B active parameters are closest to the mixtures here.
_RECIPES = {
    "lfm2_5_230m": _Recipe(3e-3, _MILLION, 19 * _TRILLION),
    "lfm2_350m": _Recipe(3e-3, _MILLION, 10 * _TRILLION),
    "lfm2_700m": _Recipe(1.3e-3, _MILLION, 10 * _TRILLION),
    "lfm2_1_2b": _Recipe(8e-4, 2 * _MILLION, 10 * _TRILLION),
    "lfm3_1_7b": _Recipe(5e-4, 2 * _MILLION, 10 * _TRILLION, fsdp=16, accumulation=2),
    "lfm2_2_6b": _Recipe(3e-4, 2 * _MILLION, 10 * _TRILLION, fsdp=16, accumulation=2),
    "lfm2_8b_a1b": _Recipe(4e-4, 4 * _MILLION, 12 * _TRILLION, **_ON_ALL),
    "lfm2_5_8b_a1b": _Recipe(4e-4, 4 * _MILLION, 38 * _TRILLION, **_ON_ALL),
    "lfm2_24b_a2b": _Recipe(3e-4, 4 * _MILLION, 12 * _TRILLION, **_ON_ALL),
}


class _SmallRecipe(NamedTuple):
    """For a CPU: rows of 512 tokens of Python's standard library, by a tokenizer of its own."""

    learning_rate: float
    rows: int
    steps: int


_SMALL = {"nano": _SmallRecipe(4e-3, 16, 6000), "micro": _SmallRecipe(3e-3, 32, 6000), "mini": _SmallRecipe(2e-3, 64, 6000)}


def _pod(name: str, recipe: _Recipe) -> dict[str, Any]:
    steps = recipe.tokens // recipe.batch
    model = preset(name)
    return {
        # The text has no default here; a tokenizer is trained on it unless tokenizer_from names one.
        "tokenizer": {"vocab_size": model.tokenizer_vocab_size or model.vocab_size, "train_bytes": 1 << 28},
        "compute": {"dtype": "bfloat16", "remat": recipe.remat, "scan_layers": recipe.scan_layers},
        "mesh": {"data": 1 if recipe.fsdp == -1 else -1, "fsdp": recipe.fsdp},
        "loader": {"seq_len": SEQ_LEN, "batch_size": recipe.batch // SEQ_LEN},
        "optimizer": {
            "learning_rate": recipe.learning_rate,
            "weight_decay": 0.1,
            "schedule": {"kind": "wsd", "warmup_steps": 2000, "decay_share": 0.1},
        },
        "loss": {"z_loss": 1e-4},
        "train": {
            "steps": steps, "accumulation": recipe.accumulation, "log_every": 10, "evaluate_every": 5000,
            "checkpoint_every": 1000, "keep_every": 100_000,
        },
        "evaluation_batches": 16,
    }


def _cpu(name: str, recipe: _SmallRecipe) -> dict[str, Any]:
    return {
        "data": {"source": "stdlib"},
        "tokenizer": {"vocab_size": preset(name).vocab_size},
        "loader": {"seq_len": 512, "batch_size": recipe.rows},
        "optimizer": {
            "learning_rate": recipe.learning_rate,
            "schedule": {"kind": "wsd", "warmup_steps": 100, "decay_share": 0.2},
        },
        "train": {"steps": recipe.steps, "log_every": 10, "evaluate_every": 1000, "checkpoint_every": 500},
        "prompts": ("import ", "def main(", "class "),
    }


def get_config(argument: str = "nano") -> ConfigDict:
    """The recipe for an architecture."""
    name = argument or "nano"
    model = preset(name)
    recipe = _cpu(name, _SMALL[name]) if name in _SMALL else _pod(name, _RECIPES[name])
    return ConfigDict({"experiment": "pretrain", "model": model, **recipe})
