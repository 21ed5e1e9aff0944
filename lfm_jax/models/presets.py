"""Named architectures. A new size is one entry; sources of the numbers are in docs/numbers.md."""

import dataclasses
import difflib

from lfm_jax.models.config import LayerType, ModelConfig, MoEConfig, RopeConfig


def _hybrid(depth: int, attention_at: tuple[int, ...]) -> tuple[LayerType, ...]:
    return tuple("full_attention" if index in attention_at else "conv" for index in range(depth))


def _lfm3_layers(depth: int) -> tuple[LayerType, ...]:
    """Every fourth block from 2 has full attention, every fourth from 4 sliding attention, the others a convolution."""
    kind = {2: "full_attention", 0: "sliding_attention"}
    return tuple(kind.get(index % 4, "conv") if index else "conv" for index in range(depth))


# Liquid AI, LFM2 (2025): published configs of LFM2-350M, -700M, -1.2B and -2.6B; 64,400 real token ids.
_LFM2_350M = ModelConfig(
    tokenizer_vocab_size=64_400,
    embed_dim=1024,
    layer_types=_hybrid(16, (2, 5, 8, 10, 12, 14)),
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=4608,
)
# LFM2-8B-A1B.
_LFM2_8B_A1B = ModelConfig(
    tokenizer_vocab_size=64_400,
    embed_dim=2048,
    layer_types=_hybrid(24, (2, 6, 10, 14, 18, 21)),
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=7168,
    moe=MoEConfig(num_experts=32, experts_per_token=4, mlp_dim=1792),
)
# LFM3-1.7B; its released config calls the full rotation "default", the class default and NeMo AutoModel "proportional".
_LFM3_1_7B = ModelConfig(
    vocab_size=128_000,
    embed_dim=2048,
    layer_types=_lfm3_layers(24),
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=7680,
    conv_width=7,
    sliding_window=256,
    full_rope=RopeConfig(theta=1e6, fraction=0.5),
    sliding_rope=RopeConfig(theta=1e4),
    sandwich_norms=True,
    attention_gate=True,
    context_length=262_144,
)
# For tests and CPUs: the same proportions at a size that trains in minutes.
_NANO = ModelConfig(
    vocab_size=4096,
    embed_dim=192,
    layer_types=_hybrid(6, (2, 4)),
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=512,
    context_length=4096,
)

PRESETS: dict[str, ModelConfig] = {
    "nano": _NANO,
    "micro": dataclasses.replace(
        _NANO, embed_dim=384, layer_types=_hybrid(8, (2, 4, 6)), num_heads=6, num_kv_heads=2, head_dim=64, mlp_dim=1024,
        vocab_size=8192,
    ),
    "mini": dataclasses.replace(
        _NANO, embed_dim=640, layer_types=_hybrid(12, (2, 5, 8, 10)), num_heads=10, num_kv_heads=5, head_dim=64,
        mlp_dim=2048, vocab_size=16_384,
    ),
    # The layout is a third party's note; the count fits the card's 229.7M.
    "lfm2_5_230m": dataclasses.replace(_LFM2_350M, layer_types=_hybrid(14, (2, 4, 6, 8, 10, 12)), mlp_dim=2560),
    "lfm2_350m": _LFM2_350M,
    "lfm2_700m": dataclasses.replace(_LFM2_350M, embed_dim=1536, num_heads=24, mlp_dim=6912),
    "lfm2_1_2b": dataclasses.replace(_LFM2_350M, embed_dim=2048, num_heads=32, mlp_dim=8192),
    "lfm2_2_6b": dataclasses.replace(
        _LFM2_350M, embed_dim=2048, num_heads=32, mlp_dim=10_752, layer_types=_hybrid(30, (2, 5, 9, 13, 17, 21, 24, 27)),
    ),
    "lfm2_8b_a1b": _LFM2_8B_A1B,
    "lfm2_5_8b_a1b": dataclasses.replace(
        _LFM2_8B_A1B, vocab_size=128_000, tokenizer_vocab_size=None, full_rope=RopeConfig(theta=5e6)
    ),
    # The dense width fits the size of the published file; it was not seen in a config.
    "lfm2_24b_a2b": dataclasses.replace(
        _LFM2_8B_A1B,
        layer_types=_hybrid(40, tuple(range(2, 40, 4))),
        mlp_dim=11_776,
        moe=MoEConfig(num_experts=64, experts_per_token=4, mlp_dim=1536),
    ),
    "lfm3_1_7b": _LFM3_1_7B,
}


def preset(name: str) -> ModelConfig:
    """The architecture called `name`.

    Raises:
      ValueError: there is none; the message names the nearest and all of them.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)[0]
        raise ValueError(f"no model preset {name!r}; did you mean {near!r}? Known: {', '.join(PRESETS)}")
    return PRESETS[name]
