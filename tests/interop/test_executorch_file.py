"""ExecuTorch programs, run from their files in ExecuTorch's runtime."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from lfm_jax.interop import GenerationSettings, executorch_file, export_folder
from lfm_jax.interop.executorch_file import SpecialIds, export_executorch, open_executorch, special_ids
from lfm_jax.interop.exported_file import ExportedFile, Reference, quiet_libraries, reference_logits
from lfm_jax.interop.torch_model import initial_state, load_torch_model
from lfm_jax.models import Decoder, ModelConfig, MoEConfig, RopeConfig, functional

LFM3 = ModelConfig(
    vocab_size=80, tokenizer_vocab_size=70, embed_dim=32, layer_types=("conv", "sliding_attention"), num_heads=4, num_kv_heads=2,
    head_dim=8, mlp_dim=64, conv_width=7, conv_bias=True, sliding_window=4, sandwich_norms=True, attention_gate=True,
    tie_embeddings=False, sliding_rope=RopeConfig(theta=100.0),
)  # fmt: skip
# Small: ExecuTorch takes seconds for each matrix.
MOE = ModelConfig(
    vocab_size=80, tokenizer_vocab_size=70, embed_dim=32, layer_types=("full_attention",), num_heads=4, num_kv_heads=2,
    head_dim=8, mlp_dim=64, moe=MoEConfig(num_experts=2, experts_per_token=1, mlp_dim=64, num_dense_layers=0),
)  # fmt: skip
CAPACITY, CHUNK = 32, 8
IDS = GenerationSettings(bos_id=3, eos_ids=(68, 69))
TEXT = [int(token) for token in np.random.default_rng(1).integers(0, 70, 20)]


@dataclasses.dataclass
class Exported:
    """A model, its file, and the model's parameters as they were before."""

    model: torch.nn.Module
    before: dict
    reference: Reference
    found: ExportedFile

    def open(self):
        return open_executorch(self.found.file)


def _exported(config, quantization, place):
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    generator = np.random.default_rng(0)
    draw = lambda leaf: generator.normal(size=leaf.shape).astype(np.float32) * 2 * max(leaf.shape) ** -0.5
    params, buffers = (jax.tree.map(draw, tree) for tree in (functions.abstract_params, functions.abstract_buffers))
    folder = export_folder(config, params, buffers, place / "hf", generation=IDS)
    model = load_torch_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reference = reference_logits(config, params, buffers, TEXT)
    found = export_executorch(
        model, place / "out" / "model.pte", reference,
        ids=special_ids(folder), quantization=quantization, capacity=CAPACITY, chunk=CHUNK,
    )  # fmt: skip
    return Exported(model, before, reference, found)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return _exported(LFM3, "none", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return _exported(MOE, "8da4w", tmp_path_factory.mktemp("quantized"))


@pytest.fixture(params=["plain", "quantized"])
def exported(request):
    return request.getfixturevalue(request.param)


def test_a_file_is_what_it_says(exported):
    assert exported.found.bytes == exported.found.file.stat().st_size
    assert [file.name for file in exported.found.file.parent.iterdir()] == ["model.pte"]


def test_float32_logits_are_ours(plain):
    assert plain.found.max_logit_difference < 1e-4
    assert plain.found.greedy_agreement == 1


def test_export_does_not_mutate_source(exported):
    after = exported.model.state_dict()
    assert after.keys() == exported.before.keys()
    assert all(torch.equal(tensor, exported.before[name]) for name, tensor in after.items())
    assert type(exported.model.embed) is torch.nn.Embedding


@pytest.mark.parametrize("lengths", [[20], [1] * 20, [3, 9, 1, 7]], ids=["whole", "one_by_one", "pieces"])
def test_any_lengths_in_a_row_are_the_whole(lengths, plain):
    """Prompts longer than a call too, and after another sequence."""
    whole, _ = plain.model(torch.tensor([TEXT]), initial_state(LFM3, 1, 20))
    conversation = plain.open()
    conversation.feed(TEXT[5:18])
    conversation.begin()
    start = 0
    for length in lengths:
        found = conversation.feed(TEXT[start : start + length])
        start += length
        np.testing.assert_allclose(found, whole[0, start - 1, :70], atol=1e-5)


def test_a_sequence_fills_the_capacity(plain):
    """And the last token of it is that of a text in one go."""
    tokens = (TEXT + TEXT)[:CAPACITY]
    whole, _ = plain.model(torch.tensor([tokens]), initial_state(LFM3, 1, CAPACITY))
    conversation = plain.open()
    for token in tokens:
        found = conversation.feed([token])
    np.testing.assert_allclose(found, whole[0, -1, :70], atol=1e-5)


def test_nothing_is_read_that_the_sequence_has_not_written(plain):
    """Buffers are whatever the memory held before; here not even numbers."""
    with torch.no_grad():
        model = executorch_file._stateful(plain.model, CAPACITY)
        for buffer in model.buffers():
            if buffer.shape[1:] in ((2, CAPACITY, 8), (6, 32)):
                buffer.fill_(torch.nan)
        found = [model(torch.tensor([TEXT[:3]]), torch.tensor([0])), model(torch.tensor([TEXT[3:5]]), torch.tensor([3]))]
        whole, _ = plain.model(torch.tensor([TEXT]), initial_state(LFM3, 1, 20))
    np.testing.assert_allclose(torch.cat(found), whole[0, [2, 4], :70], atol=1e-5)


def test_runners_are_told_ids_and_sizes(exported):
    """By the names in ExecuTorch's extension/llm/runner/constants.h; and the inputs are those that its runner gives."""
    with quiet_libraries():
        from executorch.runtime import Runtime
    program = Runtime.get().load_program(exported.found.file)
    told = {name: program.load_method(name).execute([]) for name in program.method_names - {"forward"}}
    assert told == {
        "get_bos_id": [3], "get_eos_ids": [68, 69], "get_vocab_size": [70], "get_max_context_len": [CAPACITY],
        "get_max_seq_len": [CHUNK], "get_n_layers": [exported.model.config.num_layers], "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [False], "enable_dynamic_shape": [True],
    }  # fmt: skip
    inputs = program.metadata("forward")
    assert [list(inputs.input_tensor_meta(index).sizes()) for index in range(inputs.num_inputs())] == [[1, CHUNK], [1]]
    assert list(inputs.output_tensor_meta(0).sizes()) == [1, 70]


def test_a_full_conversation_is_refused(plain):
    conversation = plain.open()
    conversation.feed(TEXT)
    with pytest.raises(ValueError, match=r"20 \+ 13 tokens are more than the capacity of this file, 32"):
        conversation.feed(TEXT[:13])


def test_quantized_logits_are_those_of_the_quantized_weights(quantized):
    """PyTorch computes the same quantised model; both round activations to 8 bits, each in its own way."""
    with quiet_libraries():
        model = executorch_file._quantized(quantized.model)
        expected, _ = model(torch.tensor([TEXT]), initial_state(MOE, 1, 20))
    exact = quantized.reference.logits[:, :70]
    conversation = quantized.open()
    found = np.stack([conversation.feed([token]) for token in TEXT])
    error = np.abs(expected[0, :, :70].numpy() - exact).mean()
    assert np.abs(found - expected[0, :, :70].numpy()).mean() < 0.2 * error
    assert np.isclose(quantized.found.max_logit_difference, np.abs(found - exact)[9:].max(), rtol=0.3)


def test_what_is_quantized_and_what_is_not(quantized):
    with quiet_libraries():
        model = executorch_file._quantized(quantized.model)
    plain = {name for name, parameter in model.named_parameters() if type(parameter.data) is torch.Tensor}
    matrices = {name for name, parameter in quantized.model.named_parameters() if parameter.dim() == 2} - {"embed.weight"}
    assert {name for name in matrices if name in plain} == {"layers.0.moe.router.weight"}
    assert "lm_head.weight" not in plain


def test_weights_are_rounded_to_their_groups(quantized):
    """Each weight lies within half a step of the original, a step being the group's range over 15 (16 values)."""
    with quiet_libraries():
        weight = executorch_file._quantized(quantized.model).layers[0]["moe"]["experts"][1]["down"].weight.dequantize().numpy()
    exact = quantized.before["layers.0.moe.experts.1.down.weight"].numpy()
    assert exact.shape == (32, 64)
    groups = exact.reshape(32, 2, 32)
    step = 2 * np.abs(groups).max(axis=2, keepdims=True) / 15
    assert (np.abs(weight.reshape(groups.shape) - groups) <= 0.51 * step).all()
    assert len(np.unique(np.round(weight.reshape(groups.shape)[3, 1], 6))) <= 16


def test_the_embedding_is_rounded_to_8_bits(quantized):
    exact = quantized.before["embed.weight"]
    embedding = executorch_file._embedding_in_8_bits(exact)
    step = exact.abs().amax(dim=1, keepdim=True) / 127
    assert embedding.rows.dtype == torch.int8
    assert ((embedding(torch.arange(80)) - exact).abs() <= 0.501 * step).all()


def test_special_ids_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 7}))
    assert special_ids(tmp_path) == SpecialIds(1, (7,))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": None}))
    with pytest.raises(ValueError, match="config.json has bos_token_id 1 and eos_token_id None; a runner needs both"):
        special_ids(tmp_path)


def test_an_unknown_quantization_is_refused(plain, tmp_path):
    with pytest.raises(ValueError, match="unknown quantization '8da8w'.*'8da4w'"):
        export_executorch(plain.model, tmp_path / "model.pte", plain.reference, ids=SpecialIds(1, (2,)), quantization="8da8w")
    assert not list(tmp_path.iterdir())


def test_ids_that_the_tokenizer_has_not_are_refused(plain, tmp_path):
    with pytest.raises(ValueError, match="bos 1 and eos 2, 70 must be ids of the tokenizer, which has 70"):
        export_executorch(plain.model, tmp_path / "model.pte", plain.reference, ids=SpecialIds(1, (2, 70)), capacity=CAPACITY)


@pytest.mark.parametrize("chunk", [1, 33])
def test_a_chunk_that_does_not_fit_is_refused(chunk, plain, tmp_path):
    ids = SpecialIds(1, (2,))
    with pytest.raises(ValueError, match=f"chunk must be from 2 to the capacity 32, got {chunk}"):
        export_executorch(plain.model, tmp_path / "model.pte", plain.reference, ids=ids, capacity=CAPACITY, chunk=chunk)
