"""The architecture as data: every LFM model is one `ModelConfig`."""

import dataclasses
import difflib
from typing import Literal, get_args

# The class of each is in lfm_jax.models.operators.
LayerType = Literal["conv", "full_attention", "sliding_attention"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, rotate-half form).

    theta: base of the frequencies.
    fraction: share of the head's frequency pairs that rotate. The frequencies are those of the whole head dimension; the pairs
      beyond the fraction stay where they are (the "proportional" kind of LFM3).
    """

    theta: float = 1e6
    fraction: float = 1.0

    def __post_init__(self):
        _require(self.theta > 0, f"rope theta must be positive, got {self.theta}")
        _require(0 < self.fraction <= 1, f"rope fraction must be in (0, 1], got {self.fraction}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in place of the dense feed-forward (LFM2-MoE).

    num_experts, experts_per_token, mlp_dim: experts of a layer, how many a token uses, and the width of each.
    num_dense_layers: the first blocks keep the dense feed-forward.
    normalize_weights: the chosen experts' scores are divided by their sum.
    scaling_factor: multiplies the weights after that.
    expert_bias: the choice is made on score + bias; the bias balances the load and carries no gradient.
    """

    num_experts: int
    experts_per_token: int
    mlp_dim: int
    num_dense_layers: int = 2
    normalize_weights: bool = True
    scaling_factor: float = 1.0
    expert_bias: bool = True

    def __post_init__(self):
        _require(
            1 <= self.experts_per_token <= self.num_experts,
            f"experts_per_token must be between 1 and num_experts={self.num_experts}, got {self.experts_per_token}",
        )
        _require(self.mlp_dim > 0, f"mlp_dim of an expert must be positive, got {self.mlp_dim}")
        _require(self.num_dense_layers >= 0, f"num_dense_layers must not be negative, got {self.num_dense_layers}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only hybrid of short convolutions and grouped-query attention.

    vocab_size: rows of the embedding.
    tokenizer_vocab_size: ids that the tokenizer knows; the rows beyond it are padding and are never sampled. None: all rows.
    layer_types: what mixes tokens in each block; its length is the depth.
    mlp_dim: width of the dense feed-forward, as it is built (not the "before adjustment" number of some published configs).
    conv_width: taps of the short convolution; conv_bias: biases on it and on its two projections.
    sliding_window: positions a sliding_attention layer sees, the current one included.
    full_rope, sliding_rope: position embedding of each kind of attention.
    moe: None for a dense model.
    sandwich_norms: a norm on each branch before it joins the residual (LFM3).
    attention_gate: a sigmoid gate for each head, computed from the block's input (LFM3).
    context_length: positions the model is meant for; nothing is allocated by it.
    """

    vocab_size: int = 65536
    tokenizer_vocab_size: int | None = None
    embed_dim: int
    layer_types: tuple[LayerType, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    conv_width: int = 3
    conv_bias: bool = False
    sliding_window: int | None = None
    full_rope: RopeConfig = RopeConfig()
    sliding_rope: RopeConfig = RopeConfig(theta=1e4)
    moe: MoEConfig | None = None
    sandwich_norms: bool = False
    attention_gate: bool = False
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    context_length: int = 128_000

    def __post_init__(self):
        for name in ("vocab_size", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "context_length"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(len(self.layer_types) > 0, "layer_types is empty: a model needs at least one block")
        kinds = get_args(LayerType)
        for index, kind in enumerate(self.layer_types):
            near = difflib.get_close_matches(str(kind), kinds, n=1, cutoff=0)[0]
            _require(kind in kinds, f"layer_types[{index}] is {kind!r}; did you mean {near!r}? Known: {', '.join(kinds)}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even for the rotary embedding, got {self.head_dim}")
        _require(self.conv_width >= 2, f"conv_width must be at least 2, got {self.conv_width}")
        if "sliding_attention" in self.layer_types:
            _require(
                self.sliding_window is not None and self.sliding_window > 0,
                f"layer_types has sliding_attention, so sliding_window must be positive; got {self.sliding_window}",
            )
        if self.tokenizer_vocab_size is not None:
            _require(
                0 < self.tokenizer_vocab_size <= self.vocab_size,
                f"tokenizer_vocab_size={self.tokenizer_vocab_size} must be between 1 and vocab_size={self.vocab_size}",
            )

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def is_moe_layer(self, index: int) -> bool:
        """Whether block `index` has a mixture of experts."""
        return self.moe is not None and index >= self.moe.num_dense_layers

    @property
    def routing_shape(self) -> tuple[int, int] | None:
        """(blocks with a mixture of experts, experts that a token uses in each); None where there is no such block."""
        blocks = sum(map(self.is_moe_layer, range(self.num_layers)))
        return (blocks, self.moe.experts_per_token) if blocks else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed; none of it changes what is computed beyond rounding.

    dtype: of activations and of the weights as they enter a matmul. "auto": bfloat16 on an accelerator, float32 on a CPU.
    short_conv, attention, grouped_matmul: implementations (see `lfm_jax.kernels`).
    expert_exchange: how tokens meet experts that other devices have: "gather" (each device gets all tokens of those that share
      the experts, and sums up at home) or "all_to_all" (each copy of a token travels to its expert and back: top_k / devices of
      the bytes, but XLA copies its buffers, so that it loses for lfm2_8b_a1b at 4 and at 8 devices of v5p, where it is 2.0 ms
      shorter on the links and 5.4 ms longer beside them; docs/benchmarks/grouped_matmul.md).
    matmul: in which numbers the projections of operators and dense feed-forwards are multiplied, "plain" is `dtype`; see
      `lfm_jax.models.quantization`, and docs/benchmarks/quantized_matmul.md for where it pays. TPU v5e and v6e multiply int8
      faster, tpu7x fp8. Routers, experts, attention's gates and products, embeddings, norms and logits are always plain.
    file_format: matrices are rounded to what a file of this format holds, before anything is computed, while parameters and
      optimizer stay as they are: training learns to live with the rounding, and evaluation tells what it costs. "none": they are
      not. See `lfm_jax.models.rounding`.
    remat: what the backward pass computes again: "none" of a block, "dots" (all but the matmuls), or the "full" block.
    scan_layers: blocks that repeat run in a loop, which compiles in 0.7 to 0.85 of the time (docs/log.md); their parameters are
      stacked for it in every step.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    short_conv: Literal["auto", "pallas", "reference"] = "auto"
    attention: Literal["auto", "splash", "cudnn", "rows", "reference"] = "auto"
    grouped_matmul: Literal["auto", "pallas", "blocks", "reference"] = "auto"
    expert_exchange: Literal["gather", "all_to_all"] = "gather"
    matmul: Literal["plain", "int8", "fp8"] = "plain"
    file_format: Literal["none", "q4_0", "8da4w"] = "none"
    remat: Literal["none", "dots", "full"] = "none"
    scan_layers: bool = False
