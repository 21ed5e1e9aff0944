"""A configuration that cannot be built is refused with what was expected."""

import dataclasses

import pytest

from lfm_jax.models import ModelConfig, MoEConfig, RopeConfig, preset

NANO = preset("nano")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be positive, got 0"),
        ({"layer_types": ()}, "layer_types is empty"),
        ({"layer_types": ("conv", "full_atention")}, r"layer_types\[1\] is 'full_atention'; did you mean 'full_attention'"),
        ({"num_kv_heads": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
        ({"head_dim": 31}, "head_dim must be even for the rotary embedding, got 31"),
        ({"conv_width": 1}, "conv_width must be at least 2, got 1"),
        ({"layer_types": ("sliding_attention",)}, "sliding_window must be positive; got None"),
        ({"tokenizer_vocab_size": 5000}, "tokenizer_vocab_size=5000 must be between 1 and vocab_size=4096"),
    ],
)
def test_bad_model_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NANO, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RopeConfig(theta=0), "rope theta must be positive, got 0"),
        (lambda: RopeConfig(fraction=1.5), r"rope fraction must be in \(0, 1\], got 1.5"),
        (lambda: MoEConfig(num_experts=4, experts_per_token=5, mlp_dim=8), "between 1 and num_experts=4, got 5"),
        (lambda: MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=0), "mlp_dim of an expert must be positive, got 0"),
        (
            lambda: MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=8, num_dense_layers=-1),
            "num_dense_layers must not be negative, got -1",
        ),
    ],
)
def test_bad_part_of_a_config_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_configs_are_hashable_so_that_jit_can_take_them_as_static():
    assert hash(NANO) == hash(ModelConfig(**{field.name: getattr(NANO, field.name) for field in dataclasses.fields(NANO)}))
