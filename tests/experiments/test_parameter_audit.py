"""The audit against published shares and transformers' own modules."""

import json
import math

import pytest
from etils import epath

from experiments import parameter_audit
from lfm_jax.models import PRESETS, preset


def _count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_gemma3_270m_equals_transformers():
    torch = pytest.importorskip("torch")
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    result = parameter_audit.gemma3_270m()
    assert sum(result.groups.values()) == _count(model)
    assert 100 * result.groups["embeddings"] / _count(model) == pytest.approx(62.6, abs=0.05)


def test_qwen3_5_0_8b_equals_transformers():
    """The text model and the vision encoder; transformers does not load the multi-token-prediction block."""
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_5 import configuration_qwen3_5 as configs
    from transformers.models.qwen3_5 import modeling_qwen3_5 as models

    text = configs.Qwen3_5TextConfig(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
        linear_num_key_heads=16, linear_num_value_heads=16, tie_word_embeddings=True,
    )  # fmt: skip
    vision = configs.Qwen3_5VisionConfig(depth=12, hidden_size=768, num_heads=12, intermediate_size=3072, out_hidden_size=1024)
    with torch.device("meta"):
        text_model, vision_model = models.Qwen3_5TextModel(text), models.Qwen3_5VisionModel(vision)
    groups = parameter_audit.qwen3_5_0_8b().groups
    assert sum(groups[name] for name in ("embeddings", "operators", "feed_forward", "norms")) == _count(text_model)
    assert groups["vision"] == _count(vision_model)
    assert 100 * groups["embeddings"] / sum(groups.values()) == pytest.approx(29, abs=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presets": ("lfm2_350",)}, "no model preset 'lfm2_350'; did you mean 'lfm2_350m'"),
        ({"presets": ("nano",), "context": 0}, "context must be positive, got 0"),
    ],
)
def test_a_wrong_value_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        parameter_audit.Config(**settings)


def test_audit_writes_every_preset_and_the_shares_add_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = parameter_audit.Config(presets=tuple(PRESETS))
    parameter_audit.main(config, epath.Path(tmp_path))
    rows = json.loads((tmp_path / "results.json").read_text())["models"]
    assert [row["model"] for row in rows] == [*PRESETS, *parameter_audit.PEERS]
    for row in rows:
        assert sum(row["groups"].values()) == row["parameters"]
        assert math.isclose(row["bfloat16_bytes"], 2 * row["parameters"])
    assert (tmp_path / "parameters.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(row["model"] in printed and f"{row['parameters']:,}" in printed for row in rows)
    assert "18.9 %" in printed and "62.6 %" in printed


def test_sizes_and_caches_of_the_audit_by_hand():
    """lfm2_350m: 6 attention layers of 8 key and value heads of 64, 10 convolutions of 1,024 channels that keep 2 values each."""
    row = parameter_audit._row("lfm2_350m", parameter_audit.audit(preset("lfm2_350m")), 4096)
    assert row["cache_per_token_bytes"] == 6 * 2 * 8 * 64 * 2
    assert row["constant_cache_bytes"] == 10 * 1024 * 2 * 2
    assert row["context_cache_bytes"] == 4096 * row["cache_per_token_bytes"] + row["constant_cache_bytes"]
    assert row["four_bit_bytes"] == 354_483_968 * 18 / 32
    sliding = parameter_audit._row("lfm3_1_7b", parameter_audit.audit(preset("lfm3_1_7b")), 4096)
    assert sliding["constant_cache_bytes"] == 5 * 256 * 2 * 4 * 128 * 2 + 13 * 2048 * 6 * 2
    assert parameter_audit._row("lfm3_1_7b", parameter_audit.audit(preset("lfm3_1_7b")), 128)["context_cache_bytes"] == (
        128 * 11 * 2 * 4 * 128 * 2 + 13 * 2048 * 6 * 2
    )
