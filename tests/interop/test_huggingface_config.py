"""config.json both ways: published spellings, defaults, and what is refused."""

import dataclasses
import types

import pytest
import transformers
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

from lfm_jax.interop import GenerationSettings
from lfm_jax.interop.huggingface_config import from_config_json, to_config_json, to_generation_json
from lfm_jax.models import PRESETS, ModelConfig, MoEConfig, RopeConfig, preset

# Shaped like the published configs: the first generation with its "block_" fields, LFM2.5, the mixture, LFM3.
LFM2 = {
    "model_type": "lfm2", "block_auto_adjust_ff_dim": True, "block_dim": 1024, "block_ff_dim": 6656,
    "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "block_norm_eps": 1e-5, "block_use_swiglu": True,
    "conv_L_cache": 3, "conv_bias": False, "conv_dim": 1024, "conv_dim_out": 1024, "eos_token_id": 7,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 1024, "max_position_embeddings": 128000, "norm_eps": 1e-5,
    "num_attention_heads": 16, "num_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_theta": 1000000.0,
    "use_pos_enc": True, "vocab_size": 65536,
}  # fmt: skip
LFM25 = {key: value for key, value in LFM2.items() if key not in ("full_attn_idxs", "block_ff_dim", "rope_theta")} | {
    "layer_types": ["full_attention" if index in (2, 5, 8, 10, 12, 14) else "conv" for index in range(16)],
    "intermediate_size": 6656, "tie_embedding": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
MOE = {
    "model_type": "lfm2_moe", "vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 7168, "moe_intermediate_size": 1792,
    "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 8, "conv_L_cache": 3, "conv_bias": False,
    "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    "use_expert_bias": True, "norm_eps": 1e-5, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "layer_types": ["full_attention" if index in (2, 6, 10, 14, 18, 21) else "conv" for index in range(24)],
}  # fmt: skip
LFM3 = {
    "model_type": "lfm3", "vocab_size": 128000, "hidden_size": 2048, "intermediate_size": 7680, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "conv_L_cache": 7, "sliding_window": 256,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "use_sandwich_norm": True, "use_attention_gate": True,
    "layer_types": list(preset("lfm3_1_7b").layer_types),
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip


def _without_tokenizer(name):
    return dataclasses.replace(preset(name), tokenizer_vocab_size=None)


def _without(content, *names):
    return {key: value for key, value in content.items() if key not in names}


@pytest.mark.parametrize(
    ("content", "name"),
    [(LFM2, "lfm2_350m"), (LFM25, "lfm2_350m"), (MOE, "lfm2_8b_a1b"), (LFM3, "lfm3_1_7b")],
    ids=["lfm2", "lfm2.5", "moe", "lfm3"],
)
def test_lfm25_config_aliases(content, name):
    assert from_config_json(content) == _without_tokenizer(name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_round_trip_and_means_the_same_to_transformers(name):
    config = preset(name)
    content = to_config_json(config, GenerationSettings(), "bfloat16")
    assert from_config_json(content) == config
    theirs = transformers.AutoConfig.for_model(**content)
    # What transformers writes of it, in its own spellings, is read back as well.
    assert from_config_json(theirs.to_dict()) == config
    assert theirs.layer_types == list(config.layer_types)
    assert theirs.eos_token_id == [7, 2]


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("rope_theta", {}),
        ("rope_theta", {"rope_parameters": None}),
        ("rope_parameters", {"rope_type": "default"}),
        ("rope_scaling", {}),
    ],
)
def test_rope_theta_roundtrip_both_spellings(field, settings):
    """Alone, inside rope_parameters, or in the older rope_scaling: an unusual theta arrives, and none is made up."""
    content = _without(LFM2, "rope_theta") | (settings if field == "rope_theta" else {})
    content |= {"rope_theta": 5e6} if field == "rope_theta" else {field: settings | {"rope_theta": 5000000}}
    assert from_config_json(content).full_rope == RopeConfig(theta=5e6)
    with pytest.raises(ValueError, match="none of rope_parameters.rope_theta, rope_theta"):
        from_config_json(_without(content, "rope_theta", "rope_parameters", "rope_scaling"))


def test_rope_theta_inside_rope_parameters_wins_as_in_transformers():
    content = LFM2 | {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
    assert from_config_json(content).full_rope.theta == 5e6
    assert transformers.AutoConfig.for_model(**content).rope_parameters["rope_theta"] == 5e6


@pytest.mark.parametrize("label", ["default", "proportional"])
def test_lfm3_partial_rotation_is_proportional_whatever_its_label(label):
    ropes = {"full_attention": LFM3["rope_parameters"]["full_attention"] | {"rope_type": label}}
    config = from_config_json(LFM3 | {"rope_parameters": LFM3["rope_parameters"] | ropes})
    assert config.full_rope == RopeConfig(theta=1e6, fraction=0.5)
    assert config.sliding_rope == RopeConfig(theta=1e4)
    written = to_config_json(config, GenerationSettings(), "float32")["rope_parameters"]["full_attention"]
    assert written == {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("name", ["tie_embedding", "tie_word_embeddings"])
def test_both_spellings_of_tied_embeddings(name):
    bare = _without(LFM25, "tie_embedding")
    assert from_config_json(bare).tie_embeddings
    assert not from_config_json(bare | {name: False}).tie_embeddings


@pytest.mark.parametrize("ff_dim", [6656, 10240, 12288, 1000])
@pytest.mark.parametrize("multiplier", [None, 1.0, 1.3, 2])
@pytest.mark.parametrize("adjust", [True, False])
def test_feed_forward_width_is_that_of_transformers(ff_dim, multiplier, adjust):
    content = LFM2 | {"block_ff_dim": ff_dim, "block_ffn_dim_multiplier": multiplier, "block_auto_adjust_ff_dim": adjust}
    content |= {"block_multiple_of": 64}
    # Not a Lfm2Config: that refuses a null multiplier, which the module understands.
    theirs = Lfm2MLP(types.SimpleNamespace(**content | {"hidden_size": 1, "intermediate_size": ff_dim}))
    assert from_config_json(content).mlp_dim == theirs.w1.out_features


def test_absent_fields_take_the_defaults_of_transformers():
    bare = _without(LFM2, "conv_bias", "norm_eps", "block_norm_eps", "max_position_embeddings", "block_multiple_of")
    bare = _without(bare, "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier")
    assert from_config_json(bare) == _without_tokenizer("lfm2_350m")
    assert from_config_json(_without(LFM3, "head_dim", "use_sandwich_norm", "use_attention_gate")) == preset("lfm3_1_7b")
    bare = _without(MOE, "norm_topk_prob", "routed_scaling_factor", "use_expert_bias", "tie_word_embeddings")
    assert from_config_json(bare) == _without_tokenizer("lfm2_8b_a1b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFM2 | {"model_type": "lfm2moe"}, "model_type 'lfm2moe' is not one of these architectures. Did you mean 'lfm2_moe'"),
        (_without(LFM2, "model_type"), "has no model_type"),
        (_without(LFM2, "full_attn_idxs"), "none of layer_types, full_attn_idxs"),
        (_without(LFM2, "num_hidden_layers"), "no num_hidden_layers"),
        (LFM2 | {"full_attn_idxs": [2, 16]}, r"full_attn_idxs has \[16\], but num_hidden_layers is 16"),
        (LFM25 | {"num_hidden_layers": 17}, "layer_types has 16 entries, but num_hidden_layers is 17"),
        (_without(LFM2, "block_ff_dim"), "none of block_ff_dim, intermediate_size"),
        (_without(LFM2, "num_attention_heads", "num_heads"), "none of num_attention_heads, num_heads"),
        (_without(MOE, "num_experts"), "has no num_experts"),
        (_without(LFM3, "intermediate_size"), "has no intermediate_size"),
        (LFM2 | {"conv_dim": 512}, "conv_dim is 512 but hidden_size is 1024"),
        (LFM2 | {"hidden_size": "1024"}, "hidden_size is '1024', expected int"),
        (LFM2 | {"conv_bias": 0}, "conv_bias is 0, expected bool"),
        (LFM2 | {"use_pos_enc": False}, "use_pos_enc is False; only True"),
        (LFM3 | {"attention_bias": True}, "attention_bias is True; only False"),
        (LFM2 | {"quantization_config": {"bits": 4}}, "quantization_config is .*; only None"),
        (LFM2 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters is .*yarn.*only default"),
        (LFM3 | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "no rope_parameters.sliding_attention"),
        (LFM3 | {"rope_parameters": {"full_attention": 1e6}}, "full_attention is 1000000.0, expected dict"),
        (_without(LFM3, "sliding_window"), "sliding_window must be positive"),
        (LFM25 | {"layer_types": ["conv"] * 15 + ["full_atention"]}, "did you mean 'full_attention'"),
    ],
)  # fmt: skip
def test_bad_configs_name_the_field(content, message):
    with pytest.raises(ValueError, match=message):
        from_config_json(content)


SMALL = ModelConfig(
    vocab_size=64, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=16),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sandwich_norms": True}, "sandwich_norms"),
        ({"attention_gate": True}, "attention_gate"),
        ({"layer_types": ("conv", "sliding_attention"), "sliding_window": 4}, "layer_types with sliding_attention"),
    ],
)
def test_combinations_without_an_architecture_are_refused(change, field):
    with pytest.raises(ValueError, match=f"no Hugging Face architecture has moe together with {field}"):
        to_config_json(dataclasses.replace(SMALL, **change), GenerationSettings(), "float32")


def test_generation_settings():
    settings = GenerationSettings(temperature=0.3, top_p=0.9, min_p=0.1, repetition_penalty=1.05)
    content = to_generation_json(dataclasses.replace(SMALL, tokenizer_vocab_size=62), settings)
    theirs = transformers.GenerationConfig(**content)
    assert (theirs.do_sample, theirs.temperature, theirs.top_p, theirs.min_p) == (True, 0.3, 0.9, 0.1)
    assert (theirs.repetition_penalty, theirs.eos_token_id, theirs.suppress_tokens) == (1.05, [7, 2], [62, 63])
    assert to_generation_json(SMALL, GenerationSettings()) == {
        "bos_token_id": 1, "eos_token_id": [7, 2], "pad_token_id": 0, "do_sample": False, "use_cache": True,
    }  # fmt: skip


@pytest.mark.parametrize(("field", "value", "message"), [("eos_ids", (), "eos_ids is empty"), ("temperature", -1.0, "got -1.0")])
def test_impossible_generation_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0, "num_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 128 are read"),
        ({"layer_types": ["conv"] * 129, "num_hidden_layers": None}, "num_hidden_layers is 129; at most 128"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776, which is no size or setting of a model"),
        ({"vocab_size": 2**62}, "vocab_size is 4611686018427387904, which is no size"),
        ({"norm_eps": float("inf")}, "norm_eps is inf, which is no size or setting"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, which is no size or setting"),
        ({"full_attn_idxs": ["1", None]}, "full_attn_idxs has .'1', None., but num_hidden_layers is 16"),
        ({"layer_types": [["conv"], {}]}, "layer_types has entries that are no names: "),
        ({"block_ffn_dim_multiplier": 1e308}, "no width comes of block_ffn_dim_multiplier 1e.308 and block_multiple_of 256"),
        ({"block_multiple_of": 0}, "no width comes of block_ffn_dim_multiplier 1.0 and block_multiple_of 0"),
    ],
)
def test_values_that_no_model_has_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_config_json(LFM2 | changes)
