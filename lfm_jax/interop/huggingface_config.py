"""`config.json` and `generation_config.json` of Hugging Face checkpoints, both ways.

Published configs of one family differ in their spellings. Where two spellings of one setting are both there, the one that
transformers reads wins, so that a folder means the same here and there.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from lfm_jax.configuration import nearest
from lfm_jax.models import ModelConfig, MoEConfig, RopeConfig

Family = Literal["lfm2", "lfm2_moe", "lfm3"]
ARCHITECTURES: dict[Family, str] = {
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "lfm3": "Lfm3ForCausalLM",
}
# Settings that change what is computed and have one value here; anything else is refused rather than ignored.
_FIXED = {
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "block_use_swiglu": (True,),
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "use_pos_enc": (True,),
}
_REQUIRED = object()
# Three times as many as any LFM has. The model is built, abstractly, before it can be compared with the weights: 10 s for 128.
_MOST_LAYERS = 128
_MOST_INTEGER = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Special ids of the tokenizer, and how others should sample by default.

    bos_id: stands in front of every text. pad_id: fills batches.
    eos_ids: generation ends with any of them; the first is the tokenizer's end-of-sequence token. The defaults are those of the
      LFM2 chat format: the end of a turn, and the end of a text.
    temperature: 0 is greedy. top_p, min_p, repetition_penalty: None leaves each out.
    """

    bos_id: int = 1
    eos_ids: tuple[int, ...] = (7, 2)
    pad_id: int = 0
    temperature: float = 0.0
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self):
        if not self.eos_ids:
            raise ValueError("eos_ids is empty: generation would never end; give at least one id")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}; 0 is greedy")


def family(config: ModelConfig) -> Family:
    """The Hugging Face architecture that can hold this configuration.

    Raises:
      ValueError: none can; the message names the fields.
    """
    lfm3_fields = [name for name in ("sandwich_norms", "attention_gate") if getattr(config, name)]
    if "sliding_attention" in config.layer_types:
        lfm3_fields.append("layer_types with sliding_attention")
    if lfm3_fields and config.moe is not None:
        raise ValueError(
            f"no Hugging Face architecture has moe together with {', '.join(lfm3_fields)}: lfm2_moe has experts and lfm3 has the "
            "others; drop one of them to export"
        )
    if lfm3_fields:
        return "lfm3"
    return "lfm2" if config.moe is None else "lfm2_moe"


def _rope_entry(rope: RopeConfig) -> dict[str, Any]:
    entry = {"rope_type": "default", "rope_theta": rope.theta}
    return entry if rope.fraction == 1 else entry | {"rope_type": "proportional", "partial_rotary_factor": rope.fraction}


def to_config_json(config: ModelConfig, generation: GenerationSettings, dtype: str) -> dict[str, Any]:
    """The content of config.json, in the spellings that most readers know (transformers, llama.cpp, vLLM, MLX).

    Raises:
      ValueError: no Hugging Face architecture can hold `config`.
    """
    kind = family(config)
    content = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        # Not a field of theirs, and carried along by every reader: the rows beyond it belong to no token.
        "tokenizer_vocab_size": config.tokenizer_vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "layer_types": list(config.layer_types),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "conv_L_cache": config.conv_width,
        "conv_bias": config.conv_bias,
        "norm_eps": config.norm_eps,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": generation.bos_id,
        "eos_token_id": list(generation.eos_ids),
        "pad_token_id": generation.pad_id,
        "use_cache": _cacheable(config),
    }
    return content | {"lfm2": _lfm2_fields, "lfm2_moe": _lfm2_moe_fields, "lfm3": _lfm3_fields}[kind](config)


def _cacheable(config: ModelConfig) -> bool:
    """transformers counts the cached tokens in an attention layer and fails where there is none."""
    return set(config.layer_types) != {"conv"}


def _lfm2_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "block_ff_dim": config.mlp_dim,
        "block_auto_adjust_ff_dim": False,  # mlp_dim is the width as it is built
        "full_attn_idxs": [index for index, kind in enumerate(config.layer_types) if kind == "full_attention"],
        "rope_theta": config.full_rope.theta,
        "rope_parameters": _rope_entry(config.full_rope),
    }


def _lfm2_moe_fields(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    return {
        "rope_theta": config.full_rope.theta,
        "rope_parameters": _rope_entry(config.full_rope),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.mlp_dim,
        "num_dense_layers": moe.num_dense_layers,
        "norm_topk_prob": moe.normalize_weights,
        "routed_scaling_factor": moe.scaling_factor,
        "use_expert_bias": moe.expert_bias,
    }


def _lfm3_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "full_attention": _rope_entry(config.full_rope),
            "sliding_attention": _rope_entry(config.sliding_rope),
        },
        "sliding_window": config.sliding_window,
        "use_sandwich_norm": config.sandwich_norms,
        "use_attention_gate": config.attention_gate,
    }


def to_generation_json(config: ModelConfig, generation: GenerationSettings) -> dict[str, Any]:
    """The content of generation_config.json; the rows of a padded vocabulary are suppressed."""
    content = {
        "bos_token_id": generation.bos_id,
        "eos_token_id": list(generation.eos_ids),
        "pad_token_id": generation.pad_id,
        "do_sample": generation.temperature > 0,
        "use_cache": _cacheable(config),
    }
    if generation.temperature > 0:
        sampling = {name: getattr(generation, name) for name in ("temperature", "top_p", "min_p")}
        content |= {name: value for name, value in sampling.items() if value is not None}
    if generation.repetition_penalty is not None:
        content["repetition_penalty"] = generation.repetition_penalty
    if config.tokenizer_vocab_size not in (None, config.vocab_size):
        content["suppress_tokens"] = list(range(config.tokenizer_vocab_size, config.vocab_size))
    return content


class _Fields:
    """A JSON object whose fields are asked for by all their spellings."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content

    def get(self, kind: type, *names: str, default: Any = _REQUIRED) -> Any:
        """The first of `names` that is there and not null, checked to be of type `kind`."""
        for name in names:
            value = self.content.get(name)
            if value is None:
                continue
            if type(value) is int and abs(value) > _MOST_INTEGER or type(value) is float and not math.isfinite(value):
                raise ValueError(f"config.json: {name} is {value!r:.40}, which is no size or setting of a model")
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                raise ValueError(f"config.json: {name} is {value!r:.200}, expected {kind.__name__}")
            return value
        if default is _REQUIRED:
            many = f"none of {', '.join(names)}; one of them must be there"
            raise ValueError(f"config.json has {many if len(names) > 1 else f'no {names[0]}'}")
        return default


def from_config_json(content: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a config.json describes, in any of its published spellings.

    Raises:
      ValueError: an unknown model_type (the nearest is named), a field that is missing under all its names, of the wrong type,
        at odds with another, or set to something that the decoder does not compute.
    """
    fields = _Fields(content)
    kind = fields.get(str, "model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"config.json: model_type {kind!r} is not one of these architectures. {nearest(kind, ARCHITECTURES)}")
    for name, allowed in _FIXED.items():
        if name in content and content[name] not in allowed:
            raise ValueError(f"config.json: {name} is {content[name]!r}; only {allowed[0]!r} can be computed here")
    embed, heads = fields.get(int, "hidden_size"), fields.get(int, "num_attention_heads", "num_heads")
    for name in ("block_dim", "conv_dim", "conv_dim_out"):
        if fields.get(int, name, default=embed) != embed:
            raise ValueError(f"config.json: {name} is {content[name]} but hidden_size is {embed}; they must be equal")
    if heads < 1:
        raise ValueError(f"config.json: num_attention_heads is {heads}; it must be at least 1")
    is_lfm3 = kind == "lfm3"
    return ModelConfig(
        vocab_size=fields.get(int, "vocab_size"),
        tokenizer_vocab_size=fields.get(int, "tokenizer_vocab_size", default=None),
        embed_dim=embed,
        layer_types=_layer_types(fields),
        num_heads=heads,
        num_kv_heads=fields.get(int, "num_key_value_heads"),
        # The defaults of transformers' classes, where configs leave it out.
        head_dim=fields.get(int, "head_dim", default=128 if is_lfm3 else embed // heads),
        mlp_dim=_mlp_dim(fields, adjustable=kind == "lfm2"),
        conv_width=fields.get(int, "conv_L_cache"),
        conv_bias=fields.get(bool, "conv_bias", default=False),
        sliding_window=fields.get(int, "sliding_window", default=None) if is_lfm3 else None,
        **_ropes(fields, is_lfm3),
        moe=_moe(fields) if kind == "lfm2_moe" else None,
        sandwich_norms=is_lfm3 and fields.get(bool, "use_sandwich_norm", default=True),
        attention_gate=is_lfm3 and fields.get(bool, "use_attention_gate", default=True),
        tie_embeddings=fields.get(bool, "tie_embedding", "tie_word_embeddings", default=True),
        norm_eps=fields.get(float, "norm_eps", "rms_norm_eps", "block_norm_eps", default=1e-5),
        context_length=fields.get(int, "max_position_embeddings", default=128_000),
    )


def _layer_types(fields: _Fields) -> tuple[str, ...]:
    types = fields.get(list, "layer_types", default=None)
    depth = fields.get(int, "num_hidden_layers", default=None if types is None else len(types))
    if depth is not None and depth > _MOST_LAYERS:
        raise ValueError(f"config.json: num_hidden_layers is {depth}; at most {_MOST_LAYERS} are read")
    if types is None:
        attention_at = fields.get(list, "full_attn_idxs", default=None)
        if attention_at is None:
            raise ValueError("config.json has none of layer_types, full_attn_idxs: one of them must say where attention is")
        if depth is None:
            raise ValueError("config.json has no num_hidden_layers, which full_attn_idxs needs beside it")
        outside = [index for index in attention_at if type(index) is not int or index not in range(depth)]
        if outside:
            raise ValueError(f"config.json: full_attn_idxs has {outside!r:.200}, but num_hidden_layers is {depth}")
        types = ["full_attention" if index in attention_at else "conv" for index in range(depth)]
    if not all(isinstance(kind, str) for kind in types):
        raise ValueError(f"config.json: layer_types has entries that are no names: {types!r:.200}")
    if len(types) != depth:
        raise ValueError(f"config.json: layer_types has {len(types)} entries, but num_hidden_layers is {depth}")
    return tuple(types)


def _mlp_dim(fields: _Fields, *, adjustable: bool) -> int:
    """The width as it is built. Only transformers' LFM2 adjusts it, and rounds only where a multiplier is set (Lfm2MLP)."""
    if not adjustable:
        return fields.get(int, "intermediate_size")
    width = fields.get(int, "block_ff_dim", "intermediate_size")
    if not fields.get(bool, "block_auto_adjust_ff_dim", default=True):
        return width
    width = int(2 * width / 3)
    if fields.content.get("block_ffn_dim_multiplier", 1.0) is None:
        return width
    multiplier = fields.get(float, "block_ffn_dim_multiplier", default=1.0)
    multiple = fields.get(int, "block_multiple_of", default=256)
    if not 0 < multiplier * width <= _MOST_INTEGER or multiple < 1:
        raise ValueError(f"config.json: no width comes of block_ffn_dim_multiplier {multiplier} and block_multiple_of {multiple}")
    return multiple * -(-int(multiplier * width) // multiple)


def _ropes(fields: _Fields, is_lfm3: bool) -> dict[str, RopeConfig]:
    settings = fields.get(dict, "rope_scaling", "rope_parameters", default={})
    if not is_lfm3:
        return {"full_rope": _rope(settings, "rope_parameters", fields)}
    ropes = {}
    for name, kind in (("full_rope", "full_attention"), ("sliding_rope", "sliding_attention")):
        if kind in settings:
            ropes[name] = _rope(_Fields(settings).get(dict, kind), f"rope_parameters.{kind}", fields)
        elif kind in (fields.content.get("layer_types") or ()):
            raise ValueError(f"config.json has no rope_parameters.{kind}, but layer_types has {kind}")
    return ropes


def _rope(entry: Mapping[str, Any], where: str, fields: _Fields) -> RopeConfig:
    """One rotation. A partial one is always "proportional": LFM3's released config calls it "default", which transformers 5.23
    takes for a full one, against its own class default and NeMo AutoModel."""
    kind = entry.get("rope_type", entry.get("type", "default"))
    if kind not in ("default", "proportional") or entry.get("factor", 1.0) != 1.0:
        raise ValueError(f"config.json: {where} is {entry}; only default or proportional with factor 1 is computed here")
    own, shared = _Fields(entry), fields.content
    theta = own.get(float, "rope_theta", default=None)
    if theta is None:
        if shared.get("rope_theta") is None:
            raise ValueError(f"config.json has none of {where}.rope_theta, rope_theta; one of them must be there")
        theta = fields.get(float, "rope_theta")
    fraction = own.get(float, "partial_rotary_factor", default=fields.get(float, "partial_rotary_factor", default=1.0))
    return RopeConfig(theta=theta, fraction=fraction)


def _moe(fields: _Fields) -> MoEConfig:
    return MoEConfig(
        num_experts=fields.get(int, "num_experts"),
        experts_per_token=fields.get(int, "num_experts_per_tok"),
        mlp_dim=fields.get(int, "moe_intermediate_size"),
        num_dense_layers=fields.get(int, "num_dense_layers"),
        normalize_weights=fields.get(bool, "norm_topk_prob", default=True),
        scaling_factor=fields.get(float, "routed_scaling_factor", default=1.0),
        expert_bias=fields.get(bool, "use_expert_bias", default=True),
    )
