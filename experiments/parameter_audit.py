"""Where the parameters are: embeddings, operators, feed-forward, norms; memory and cache of every preset and of the peers."""

import dataclasses

from etils import epath

from experiments.report import format_figure
from experiments.results import write_results
from lfm_jax.models import ModelConfig, preset
from lfm_jax.models.accounting import GROUPS, active_parameter_count, cache_bytes, parameter_groups
from lfm_jax.models.cache import CacheBytes

# A block of 32 four-bit weights and a float16 scale (llama.cpp's Q4_0).
BITS_PER_WEIGHT_4BIT = 4.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """presets: names of our architectures; peers: whether to add the published peers; context: tokens of the cache column."""

    presets: tuple[str, ...]
    peers: bool = True
    context: int = 32_768

    def __post_init__(self):
        for name in self.presets:
            preset(name)  # raises where there is none
        if self.context < 1:
            raise ValueError(f"context must be positive, got {self.context}")


@dataclasses.dataclass(frozen=True)
class Audit:
    """Parameters by group and what a sequence's cache costs; window: reach of the layers that `cache.windows` is for."""

    groups: dict[str, int]
    active: int
    cache: CacheBytes
    window: int | None


def audit(config: ModelConfig) -> Audit:
    """The audit of one of our architectures, in bfloat16."""
    return Audit(parameter_groups(config), active_parameter_count(config), cache_bytes(config), config.sliding_window)


def gemma3_270m() -> Audit:
    """Gemma 3 270M (google/gemma-3-270m config.json): every sixth of 18 layers sees everything, the others 512 positions."""
    vocab, embed, layers, heads, kv_heads, head_dim, mlp = 262_144, 640, 18, 4, 1, 256, 2048
    groups = {
        "embeddings": vocab * embed,
        "operators": layers * embed * head_dim * (2 * heads + 2 * kv_heads),
        "feed_forward": layers * 3 * embed * mlp,
        "norms": layers * (4 * embed + 2 * head_dim) + embed,
    }
    key_value = 2 * kv_heads * head_dim * 2
    return Audit(groups, sum(groups.values()), CacheBytes(3 * key_value, 15 * key_value * 512, 0), 512)


def qwen3_5_0_8b() -> Audit:
    """Qwen3.5-0.8B (Qwen/Qwen3.5-0.8B config.json): three gated delta nets to one gated attention, a vision encoder, and one
    multi-token-prediction block; the card's 0.87B counts them all."""
    vocab, embed, mlp, delta, full = 248_320, 1024, 3584, 18, 6
    key, value, delta_heads, taps = 2048, 2048, 16, 4
    heads, kv_heads, head_dim = 8, 2, 256
    mixed = 2 * key + value
    delta_net = embed * (mixed + value + 2 * delta_heads) + taps * mixed + value * embed + 2 * delta_heads
    attention = embed * head_dim * (2 * heads + 2 * kv_heads + heads)
    block_norms, head_norms = 2 * embed, 2 * head_dim
    prediction = 2 * embed * embed + attention + 3 * embed * mlp + block_norms + head_norms + 3 * embed
    groups = {
        "embeddings": vocab * embed,
        "operators": delta * delta_net + full * attention,
        "feed_forward": (delta + full) * 3 * embed * mlp,
        "norms": (delta + full) * block_norms + full * head_norms + delta * 128 + embed,
        "vision": _qwen3_5_vision(embed),
        "token_prediction": prediction,
    }
    state = delta * (4 * delta_heads * 128 * 128 + 2 * taps * mixed)  # float32 recurrent state, bfloat16 convolution window
    return Audit(groups, sum(groups.values()), CacheBytes(full * 2 * kv_heads * head_dim * 2, 0, state), None)


def _qwen3_5_vision(text_embed: int) -> int:
    """12 blocks of 768 with biases and LayerNorms, 2 x 16 x 16 patches, 2,304 positions, and the merger of 2 x 2 patches."""
    embed, mlp, merged = 768, 3072, 4 * 768
    block = 4 * embed * embed + 4 * embed + 2 * embed * mlp + mlp + embed + 4 * embed
    patches = 3 * 2 * 16 * 16 * embed + embed + 2304 * embed
    merger = merged * merged + merged + merged * text_embed + text_embed + 2 * embed
    return 12 * block + patches + merger


PEERS = {"gemma3_270m": gemma3_270m, "qwen3_5_0_8b": qwen3_5_0_8b}


def _row(name: str, result: Audit, context: int) -> dict:
    total = sum(result.groups.values())
    return {
        "model": name,
        "parameters": total,
        "active_parameters": result.active,
        "groups": result.groups,
        "embedding_share": result.groups["embeddings"] / total,
        "bfloat16_bytes": 2 * total,
        "four_bit_bytes": round(total * BITS_PER_WEIGHT_4BIT / 8),
        "cache_per_token_bytes": result.cache.per_token,
        "constant_cache_bytes": result.cache.constant + result.cache.windows,
        "context_cache_bytes": result.cache.total(context, result.window),
    }


def _print_table(rows: list[dict]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("model", box=box.SIMPLE_HEAD)
    for name in ("parameters", *GROUPS, "bfloat16", "4 bits", "cache a token", "constant", "at context"):
        table.add_column(name.replace("_", " "), justify="right")
    sizes = ("bfloat16_bytes", "four_bit_bytes", "cache_per_token_bytes", "constant_cache_bytes", "context_cache_bytes")
    for row in rows:
        shares = [format_figure(row["groups"][group] / row["parameters"], "share") for group in GROUPS]
        figures = [format_figure(row[name], name) for name in sizes]
        table.add_row(row["model"], format_figure(row["parameters"]), *shares, *figures)
    console = Console()
    console.width = max(console.width, 150)  # in a narrower window a row breaks, in a log nothing is cut off
    console.print(table)


def _plot(rows: list[dict], path: epath.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['model']}  {row['parameters'] / 1e6:,.0f}M" for row in rows]
    left = [0.0] * len(rows)
    for group in dict.fromkeys(group for row in rows for group in row["groups"]):
        shares = [100 * row["groups"].get(group, 0) / row["parameters"] for row in rows]
        axes.barh(names, shares, left=left, label=group.replace("_", " "))
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="share of the parameters, %", xlim=(0, 100))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, frameon=False)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=150)


def main(config: Config, workdir: epath.Path) -> None:
    """Prints the table and writes it to results.json, and the shares to parameters.png."""
    audits = {name: audit(preset(name)) for name in config.presets}
    if config.peers:
        audits |= {name: make() for name, make in PEERS.items()}
    rows = [_row(name, result, config.context) for name, result in audits.items()]
    _print_table(rows)
    _plot(rows, workdir / "parameters.png")
    write_results(workdir, {"models": rows, "context_tokens": config.context}, config)
