"""The forward pass as a file of jax.export, run from the file."""

import jax
import numpy as np
import pytest
from jax import export

from lfm_jax.interop import stablehlo
from lfm_jax.interop.exported_file import reference_logits
from lfm_jax.interop.stablehlo import export_stablehlo, load_stablehlo
from lfm_jax.models import Decoder, ModelConfig, MoEConfig, RopeConfig, functional

# All that a block can have.
CONFIG = ModelConfig(
    vocab_size=80, embed_dim=32, layer_types=("conv", "sliding_attention", "full_attention"), num_heads=4, num_kv_heads=2,
    head_dim=8, mlp_dim=48, moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=24, num_dense_layers=2), conv_width=7,
    conv_bias=True, sliding_window=4, sandwich_norms=True, attention_gate=True, full_rope=RopeConfig(fraction=0.5),
    tie_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(params, buffers, reference, what the exporter says)"""
    params, buffers = functional(lambda rngs: Decoder(CONFIG, rngs=rngs)).init(jax.random.key(0))
    reference = reference_logits(CONFIG, params, buffers, list(range(3, 23)))
    file = tmp_path_factory.mktemp("stablehlo") / "out" / "model.stablehlo"
    return params, buffers, reference, export_stablehlo(CONFIG, params, buffers, file, reference)


def test_a_file_is_what_it_says(exported):
    *_, found = exported
    assert found.bytes == found.file.stat().st_size
    assert found.max_logit_difference < 1e-5
    assert found.greedy_agreement == 1
    assert [file.name for file in found.file.parent.iterdir()] == ["model.stablehlo"]


def test_it_is_for_other_platforms_and_any_size(exported):
    """Lowered for machines that are not here; the weights are not in it."""
    params, buffers, reference, found = exported
    program = export.deserialize(bytearray(found.file.read_bytes()))
    assert program.platforms == ("cpu", "tpu", "cuda")
    assert "custom_call @Sharding" not in program.mlir_module()
    assert not any(kernel in program.mlir_module() for kernel in ("tpu_custom_call", "cudnn"))
    logits = load_stablehlo(found.file, params, buffers)
    text = reference.tokens.astype(np.int32)
    for batch, seq in ((1, 1), (3, 18)):
        tokens = np.zeros((batch, seq), np.int32)
        tokens[-1] = text[:seq]
        np.testing.assert_allclose(logits(tokens)[-1], reference.logits[:seq], atol=1e-5)


def test_products_are_of_float32_on_every_platform(exported):
    """As in what the file is compared with; TPUs, and GPUs, take fewer bits unless they are told."""
    *_, found = exported
    program = export.deserialize(bytearray(found.file.read_bytes())).mlir_module()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_a_file_of_another_model_is_refused(exported):
    params, buffers, _, found = exported
    other = {**params, "final_norm": {"scale": np.ones(33, np.float32)}}
    with pytest.raises(ValueError, match=r"of another model: for final_norm.scale it wants \(32,\), and got \(33,\)"):
        load_stablehlo(found.file, other, buffers)
    with pytest.raises(ValueError, match=r"for final_norm.scale it wants \(32,\), and got None"):
        load_stablehlo(found.file, {name: part for name, part in params.items() if name != "final_norm"}, buffers)


def test_a_damaged_file_is_refused(exported, tmp_path):
    *_, found = exported
    (tmp_path / "half").write_bytes(found.file.read_bytes()[:1000])
    (tmp_path / "text").write_text("no program")
    for name in ("half", "text"):
        with pytest.raises(ValueError, match=f"{name} is no file of jax.export, or damaged"):
            load_stablehlo(tmp_path / name, {}, {})


def test_a_file_for_other_platforms_is_refused(exported, monkeypatch):
    params, buffers, _, found = exported
    monkeypatch.setattr(stablehlo, "_here", lambda: "rocm")
    with pytest.raises(ValueError, match="is for cpu, tpu, cuda, and this is rocm; export it"):
        load_stablehlo(found.file, params, buffers)


@pytest.mark.parametrize(
    ("platforms", "message"),
    [
        (("cpu", "gpu"), "unknown platform 'gpu'; choose from cpu, cuda, rocm, tpu"),
        (("tpu",), "the platforms lack this one, 'cpu'"),
    ],
)
def test_platforms_are_checked(platforms, message, exported, tmp_path):
    params, buffers, reference, _ = exported
    with pytest.raises(ValueError, match=message):
        export_stablehlo(CONFIG, params, buffers, tmp_path / "model", reference, platforms=platforms)


def test_a_file_that_computes_something_else_does_not_stay(exported, tmp_path):
    params, buffers, reference, _ = exported
    wrong = reference._replace(logits=reference.logits + 1)
    with pytest.raises(ValueError, match="the file's logits differ by 1 from ours"):
        export_stablehlo(CONFIG, params, buffers, tmp_path / "model", wrong, platforms=("cpu",))
    assert not list(tmp_path.iterdir())
