"""Supervised fine-tuning: a trained model learns to say what assistants say in conversations, and nothing else of them.

    python run.py --config=configs/sft.py --workdir=workdirs/sft --config.init_from=workdirs/quickstart \
        --config.data.sources=FILE.jsonl,FOLDER

A line of a file is a conversation, {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}, or ShareGPT's. Only the
assistant's turns are trained, the symbol that ends them included; answers of several conversations are packed into a row and see
nothing of each other. `data.chat_format` says how turns are written (lfm2, lfm2_5, lfm2_5_instruct, a Jinja file, or what comes
with the tokenizer). Give several sources with commas, and their shares of the rows in `loader.weights`. Look at the rows first,
with what is trained in green:

    python run.py --config=configs/inspect_conversations.py --workdir=workdirs/inspection --config.init_from=workdirs/quickstart \
        --config.data.sources=FILE.jsonl

Conversations to begin with: configs/task_data.py writes those of tasks that a program can check. Gives `nll_per_token` of what is
held out (5 %), before and after, and of each source.

    python run.py --config=configs/sft.py --workdir=workdirs/adapted --config.init_from=workdirs/quickstart \
        --config.data.sources=FILE.jsonl --config.low_rank.rank=16 --config.optimizer.learning_rate=1e-2

trains adapters beside a model that stands still (LoRA, Hu et al. 2021): there are no moments and gradients of the model. Adapters
want ten times the learning rate (Schulman et al. 2025, "LoRA Without Regret"). Whoever loads such a workdir has the merged model,
and so has the export.

As it stands this is for small models on a CPU; on a pod slice give the mesh and the sizes of configs/pretrain.py, such as
`--config.loader.seq_len=4096 --config.loader.batch_size=256`.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict(
        {
            "experiment": "sft",
            "loader": {"seq_len": 512, "batch_size": 16},
            "optimizer": {"learning_rate": 1e-3, "schedule": {"kind": "cosine", "warmup_steps": 20}},
            "train": {"steps": 300, "log_every": 10, "evaluate_every": 100, "checkpoint_every": 100},
            "evaluation_batches": 16,
        }
    )
