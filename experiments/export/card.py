"""The model card: what the files are, what each was compared with, and how to run it."""

from collections.abc import Sequence

from etils import epath

from experiments.export.formats import Row
from experiments.results import FILE, read_results
from experiments.stages import Stage
from lfm_jax.models import ModelConfig
from lfm_jax.models.accounting import active_parameter_count, parameter_count

_RUN = {
    "hf/": "`AutoModelForCausalLM.from_pretrained(\"hf\")`",
    ".gguf": "`llama-cli -m FILE -p \"...\"` (llama.cpp)",
    ".pte": "ExecuTorch's runner; `lfm_jax.interop.executorch_file.open_executorch(FILE)`",
    ".pt2": "`torch.export.load(FILE)`; `lfm_jax.interop.torch_export.open_pt2(FILE)`",
    ".onnx": "onnxruntime; `lfm_jax.interop.torch_export.open_onnx(FILE)`",
    ".stablehlo": "`lfm_jax.interop.stablehlo.load_stablehlo(FILE, params, buffers)`",
}  # fmt: skip


def write_card(path: epath.Path, stage: Stage, rows: Sequence[Row]) -> None:
    """Writes the card. Figures of the run that the model is of are told where its results.json has them, of that step."""
    config = stage.config
    lines = ["# Model card", "", _described(config), *_trained(stage), "", "## Files", ""]
    columns = ("file", "MB", "run by", "largest difference", "greedy agreement", "tokens/s here", "first token, ms", "peak MB")
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    shown = lambda value, form: "" if value is None else format(value, form)
    lines += [
        f"| {row.file} | {row.bytes / 1e6:.2f} | {row.runtime or ''} | {shown(row.max_difference, '.1e')} | "
        f"{shown(row.greedy_agreement, '.0%')} | {shown(row.tokens_per_second, ',.0f')} | "
        f"{shown(row.first_token_seconds and 1000 * row.first_token_seconds, '.1f')} | "
        f"{shown(row.peak_bytes and row.peak_bytes / 1e6, ',.0f')} |"
        for row in rows
        if row.runtime  # not the small files beside the weights of hf
    ]
    lines += [
        "", "Differences are of logits, for GGUF of log-probabilities, between the runtime and the model it was made of, over a",
        "short text; greedy agreement is the share of its positions with the same most likely token, for GGUF the share of a",
        "greedy continuation before the first other token. The first token comes after a prompt of 128; the peak is of memory",
        "above what the process had before it opened the file.", "", "## To run them", "",
    ]  # fmt: skip
    lines += [f"- {kind}: {how}" for kind, how in _RUN.items() if any(kind in row.file for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def _described(config: ModelConfig) -> str:
    counts = {kind: config.layer_types.count(kind) for kind in dict.fromkeys(config.layer_types)}
    blocks = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    size = f"{parameter_count(config):,} parameters"
    size += f", {active_parameter_count(config):,} of them for a token" if config.moe else ""
    return (
        f"A causal hybrid language model of {size}: {config.num_layers} blocks ({blocks}), width {config.embed_dim}, "
        f"a vocabulary of {config.vocab_size:,} rows, for up to {config.context_length:,} tokens."
    )


def _trained(stage: Stage) -> list[str]:
    results = stage.tokenizer_path.parent / FILE
    lines = [] if stage.step is None else [f"It is the checkpoint of step {stage.step}."]
    found = read_results(results.parent) if stage.step is not None and results.exists() else {}
    if found.get("steps") == stage.step:  # a run that goes on exports before it writes its figures over the earlier ones
        names = ("bits_per_byte", "nll_per_token", "tokens_trained")
        lines += [f"{name}: {found[name]:,.6g}." for name in names if name in found]
    return lines
