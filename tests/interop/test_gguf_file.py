"""GGUF files, judged by llama.cpp itself (xllamacpp) and by the gguf package's reader."""

import dataclasses
import functools
import inspect
import math
import re
import resource
import shutil
import sys
import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from data_pipelines import Document, TokenizerConfig, train_tokenizer
from experiments.llama_cpp import run_llama_cpp
from lfm_jax.interop import GenerationSettings, export_folder, gguf_file
from lfm_jax.interop.gguf_file import TYPES, export_gguf
from lfm_jax.interop.gguf_header import GgufHeader, read_gguf_header
from lfm_jax.interop.huggingface_weights import weight_table
from lfm_jax.interop.torch_model import initial_state, load_torch_model
from lfm_jax.models import PRESETS, Decoder, ModelConfig, MoEConfig, RopeConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh, parameter_sharding

DENSE = ModelConfig(
    vocab_size=640, tokenizer_vocab_size=600, embed_dim=64, layer_types=("conv", "full_attention", "conv", "full_attention"),
    num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=96, context_length=512,
)  # fmt: skip
MOE = dataclasses.replace(DENSE, moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=32, num_dense_layers=1))
CONFIGS = {
    "dense": DENSE,
    "untied_width_7": dataclasses.replace(
        DENSE, tie_embeddings=False, conv_width=7, full_rope=RopeConfig(theta=500.0), norm_eps=1e-2
    ),
    "moe": MOE,
    "moe_untied_no_bias": dataclasses.replace(
        MOE, tie_embeddings=False, moe=dataclasses.replace(MOE.moe, experts_per_token=1, num_dense_layers=0, expert_bias=False)
    ),
}
PROMPTS = [[1, *np.random.default_rng(length).integers(15, 600, length).tolist()] for length in (4, 9, 2, 30)]
LENGTH = 100
STOP_IDS = GenerationSettings().eos_ids


@functools.cache
def _weights(config, spread=3.0):
    """The model, and weights with which its logits have about this standard deviation."""
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    generator = np.random.default_rng(0)

    def draw(keys, leaf):
        fan_in = math.prod(leaf.shape[:-1]) if "out_proj" in keys[-1].key else leaf.shape[-2] if len(leaf.shape) > 1 else 1
        scale = spread / config.embed_dim**0.5 if keys[0].key in ("embed", "lm_head") else fan_in**-0.5
        return (generator.normal(size=leaf.shape) * scale).astype(np.float32)

    trees = (functions.abstract_params, functions.abstract_buffers)
    return functions, *(jax.tree_util.tree_map_with_path(draw, tree) for tree in trees)


@functools.cache
def _jitted(functions):
    @jax.jit
    def forward(params, buffers, tokens):
        model = functions.bind(params, buffers)
        logits = model.logits(model(tokens).hidden)
        return jax.nn.log_softmax(logits[..., : model.config.tokenizer_vocab_size])

    return forward


def _log_probs(functions, params, buffers, rows):
    """Of every id that the tokenizer has, after each token: [seq, ids] for each row."""
    padded = np.zeros((len(PROMPTS), LENGTH), np.int32)  # what follows is no matter to what came before
    for place, row in zip(padded, rows, strict=False):
        place[: len(row)] = row
    found = np.asarray(_jitted(functions)(params, buffers, padded))
    return [values[: len(row)] for values, row in zip(found, rows, strict=False)]


def _of_tokens(log_probs, rows):
    return np.concatenate([values[np.arange(len(row) - 1), row[1:]] for values, row in zip(log_probs, rows, strict=True)])


def _continue(weights, choose=np.argmax):
    """PROMPTS and 64 tokens each, chosen from the log-probabilities after those before, or fewer up to the end."""
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(64):
        for row, values in zip(rows, _log_probs(*weights, rows), strict=True):
            if row[-1] not in STOP_IDS:
                row.append(int(choose(values[-1])))
    return rows


def _new(rows):
    return [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(TokenizerConfig(vocab_size=600), [Document(inspect.getsource(inspect), "inspect")], folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_equals_llama_cpp(name, tokenizer, tmp_path):
    """Step by step and at once; greedily, 64 tokens or up to the same end; four sequences at a time as each alone."""
    config = CONFIGS[name]
    weights = _weights(config)
    file = export_gguf(config, *weights[1:], tmp_path / "model.gguf", tokenizer=tokenizer, type="F32")
    alone = run_llama_cpp(file, scored=PROMPTS, followed=PROMPTS, prompts=PROMPTS)
    log_probs = _log_probs(*weights, PROMPTS)
    assert log_probs[3].std() > 2
    np.testing.assert_allclose(np.concatenate(alone.log_probs), _of_tokens(log_probs, PROMPTS), atol=1e-3)
    np.testing.assert_allclose(alone.next_log_probs, [values[-1] for values in log_probs], atol=1e-3)
    ours = _new(_continue(weights))
    assert alone.continuations == ours
    assert 64 in map(len, ours)
    assert run_llama_cpp(file, prompts=PROMPTS, parallel=4).continuations == ours


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_smaller_types_say_nearly_the_same(name, tokenizer, tmp_path):
    """On text that the model sampled itself. llama.cpp rounds what is multiplied as it rounds the weights, so that bfloat16 is
    worse than its weights alone; perplexity stays within 0.5 % down to 8 bits."""
    config = CONFIGS[name]
    weights = _weights(config, spread=0.5)
    draws = np.random.default_rng(2)
    rows = _continue(weights, lambda values: np.argmax(values + draws.gumbel(size=values.size)))
    ours = _of_tokens(_log_probs(*weights, rows), rows)
    sizes = []
    for type, largest, perplexity in (("F16", 1e-2, 1e-3), ("BF16", 0.1, 1e-3), ("Q8_0", 0.2, 5e-3), ("Q4_0", 1.5, 5e-2)):
        file = export_gguf(config, *weights[1:], tmp_path / "model.gguf", tokenizer=tokenizer, type=type)
        answers = run_llama_cpp(file, scored=rows)
        assert np.abs(np.concatenate(answers.log_probs) - ours).max() < largest
        assert answers.perplexity == pytest.approx(np.exp(-ours.mean()), rel=perplexity)
        sizes.append(file.stat().length)
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]


@pytest.mark.parametrize(("type", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_halves_equal_llama_cpp_where_both_round_what_is_multiplied(type, dtype, tokenizer, tmp_path, monkeypatch):
    """llama.cpp rounds activations to the type of the matrix before each product. Rounded like that in PyTorch, which computes in
    float32, log-probabilities are the same to 1e-3; with rounded weights alone bfloat16 is off by 1.5e-2."""
    config = CONFIGS["dense"]
    weights = _weights(config, spread=0.5)
    export_folder(config, *weights[1:], tmp_path / "hf")
    model, linear = load_torch_model(tmp_path / "hf"), torch.nn.functional.linear
    rounded = lambda array: array.to(dtype).float()
    model.embed.weight.data = rounded(model.embed.weight.data)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, matrix, _=None: linear(rounded(x), rounded(matrix)))
    state = initial_state(config, 1, 64)
    row = [1, *np.random.default_rng(3).integers(15, 600, 60).tolist()]
    ours = torch.log_softmax(model(torch.tensor([row]), state)[0][..., :600], -1).numpy()
    file = export_gguf(config, *weights[1:], tmp_path / "model.gguf", tokenizer=tokenizer, type=type)
    (found,) = run_llama_cpp(file, scored=[row]).log_probs
    np.testing.assert_allclose(found, _of_tokens(ours, [row]), atol=1e-3)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_package_reads_what_was_written(name, type, tokenizer, tmp_path):
    """Every tensor under its name, as near to its master as the type allows; our own header reader sees the same file."""
    config = CONFIGS[name]
    _, params, buffers = _weights(config)
    file = export_gguf(config, params, buffers, tmp_path / "model.gguf", tokenizer=tokenizer, type=type)
    reader = gguf.GGUFReader(file)
    vocabulary = ("token_embd.weight", "output.weight")
    found = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for weight in weight_table(config):
        tree = buffers if weight.path[-1] == "expert_bias" else params
        own = functools.reduce(lambda tree, key: tree[key], weight.path, tree)
        name = _gguf_name(weight.name)
        stored = found[name] if weight.expert is None else found[name][weight.expert]
        expected = weight.to_checkpoint(own)[: len(stored) if name in vocabulary else None]
        expected = expected.reshape(stored.shape)
        largest = np.abs(expected).reshape(-1, min(32, expected.shape[-1])).max(axis=-1).repeat(min(32, expected.shape[-1]))
        error = np.abs(stored - expected).reshape(-1)
        exact = expected.ndim == 1 or "shortconv.conv" in name or "ffn_gate_inp" in name
        kept = "Q8_0" if type == "Q4_0" and name in vocabulary else type
        bound = 0 if exact else {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.0045, "Q4_0": 0.126}[kept]
        assert (error <= bound * largest + (0 if exact or kept == "F32" else 1e-7)).all(), name
    own = read_gguf_header(file)
    assert [(t.name, t.type, t.shape, t.start) for t in own.tensors] == [
        (t.name, t.tensor_type.name, tuple(t.shape[::-1].tolist()), t.data_offset) for t in reader.tensors
    ]
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in own.metadata.items()} == fields


def _gguf_name(name):
    """As in FACTS and llama.cpp's src/llama-arch.cpp, written down a second time."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.embedding_norm.weight": "token_embd_norm.weight"}
    if name in whole or name == "lm_head.weight":
        return whole.get(name, "output.weight")
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    rest = re.sub(r"experts\.\d+", "experts", rest)
    parts = {
        "operator_norm": "attn_norm", "ffn_norm": "ffn_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up", "feed_forward.gate": "ffn_gate_inp", "feed_forward.expert_bias": "exp_probs_b.bias",
        "feed_forward.experts.w1": "ffn_gate_exps", "feed_forward.experts.w2": "ffn_down_exps",
        "feed_forward.experts.w3": "ffn_up_exps", "conv.conv": "shortconv.conv", "conv.in_proj": "shortconv.in_proj",
        "conv.out_proj": "shortconv.out_proj", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
    }  # fmt: skip
    return f"blk.{layer}.{parts[rest.removesuffix('.weight')]}" + (".weight" if rest.endswith(".weight") else "")


@pytest.mark.parametrize("name", ["lfm2_350m", "lfm2_8b_a1b"])
def test_metadata_of_published_sizes(name):
    """By the keys and values that llama.cpp's conversion/lfm2.py writes, without the weights."""
    config = PRESETS[name]
    writer = gguf.GGUFWriter(None, "lfm2" if config.moe is None else "lfm2moe")
    gguf_file._add_model(gguf, writer, config, config.tokenizer_vocab_size)
    found = {key: value.value for key, value in writer.kv_data[0].items()}
    arch = found.pop("general.architecture")
    attention = (2, 5, 8, 10, 12, 14) if name == "lfm2_350m" else (2, 6, 10, 14, 18, 21)
    expected = {
        "vocab_size": 64400, "context_length": 128000, "embedding_length": 1024, "block_count": 16, "feed_forward_length": 4608,
        "attention.head_count": 16, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6, "shortconv.l_cache": 3,
    }  # fmt: skip
    if name == "lfm2_8b_a1b":
        expected |= {
            "embedding_length": 2048, "block_count": 24, "feed_forward_length": 7168, "attention.head_count": 32,
            "expert_count": 32, "expert_used_count": 4, "expert_feed_forward_length": 1792, "leading_dense_block_count": 2,
            "expert_gating_func": 2,
        }  # fmt: skip
    expected["attention.head_count_kv"] = [8 if layer in attention else 0 for layer in range(expected["block_count"])]
    assert found == {f"{arch}.{key}": value for key, value in expected.items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_padded_vocab_export_and_never_sampled(tied, tokenizer, tmp_path):
    """The rows beyond the tokenizer would win every time; llama.cpp does not have them."""
    config = dataclasses.replace(DENSE, tie_embeddings=tied)
    functions, params, buffers = _weights(config)
    head = np.array(params["embed"]["embedding"] if tied else params["lm_head"].T)
    head[600:640] = 10 * head[:40]
    head[600:620] -= 20 * head[:20]
    params = {**params, "embed": {"embedding": head}} if tied else {**params, "lm_head": head.T}
    file = export_gguf(config, params, buffers, tmp_path / "model.gguf", tokenizer=tokenizer, type="F32")
    answers = run_llama_cpp(file, prompts=PROMPTS, followed=[[1, 20]])
    assert answers.continuations == _new(_continue((functions, params, buffers)))
    assert len(answers.next_log_probs[0]) == 600
    (header,) = [tensor for tensor in read_gguf_header(file).tensors if tensor.name == "token_embd.weight"]
    assert header.shape == (600, 64)


def test_sharded_parameters_make_the_same_file_and_stay_as_they_are(tokenizer, tmp_path):
    functions, params, buffers = _weights(MOE)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    is_axes = lambda node: isinstance(node, tuple)
    place = lambda axes, leaf: jax.device_put(leaf, parameter_sharding(mesh, axes, leaf.shape))
    sharded = jax.tree.map(place, functions.param_axes, params, is_leaf=is_axes)
    assert len(sharded["layers"][0]["mlp"]["gate"].sharding.device_set) == 8
    files = [
        export_gguf(MOE, tree, buffers, tmp_path / name, tokenizer=tokenizer).read_bytes()
        for name, tree in (("host", params), ("mesh", sharded))
    ]
    assert files[0] == files[1]
    jax.tree.map(np.testing.assert_array_equal, sharded, params)


def test_export_streams(tokenizer, tmp_path):
    """NumPy's memory beyond the model: a copy of the largest tensor in the file's order, and its quantised form."""
    config = dataclasses.replace(DENSE, embed_dim=256, num_heads=16, mlp_dim=1024, layer_types=("conv", "full_attention") * 3)
    _, params, buffers = _weights(config)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    assert sum(sizes) > 6 * max(sizes)
    export_gguf(config, params, buffers, tmp_path / "model.gguf", tokenizer=tokenizer)
    tracemalloc.start()
    export_gguf(config, params, buffers, tmp_path / "model.gguf", tokenizer=tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * max(sizes)


REFUSED = {
    "lfm3": ({"attention_gate": True}, "llama.cpp knows LFM3 from b11960 on"),
    "kinds": ({"layer_types": ("conv", "conv")}, "all its blocks are of one kind"),
    "bias": ({"conv_bias": True}, "conv_bias is True"),
    "rope": ({"full_rope": RopeConfig(fraction=0.5)}, "full_rope turns 0.5 of a head's pairs"),
    "heads": ({"head_dim": 32}, "num_heads . head_dim is 128 and embed_dim 64"),
    "normalise": ({"moe": dataclasses.replace(MOE.moe, normalize_weights=False)}, "normalize_weights is False"),
    "scale": ({"moe": dataclasses.replace(MOE.moe, scaling_factor=2.5)}, "scaling_factor is 2.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(case, tmp_path):
    change, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        export_gguf(dataclasses.replace(DENSE, **change), {}, {}, tmp_path / "model.gguf", tokenizer="none")


def _changed(params, value):
    embedding = np.array(params["embed"]["embedding"])
    embedding[3, 5] = value
    return {**params, "embed": {"embedding": embedding}}


def test_bad_weights_are_refused_and_leave_no_file(tokenizer, tmp_path):
    _, params, buffers = _weights(DENSE)
    for value, type in ((np.nan, "F32"), (np.inf, "BF16"), (-np.inf, "Q8_0"), (65600.0, "F16")):
        with pytest.raises(ValueError, match=f"embed_tokens.weight has values up to .*{type} holds"):
            export_gguf(DENSE, _changed(params, value), buffers, tmp_path / "model.gguf", tokenizer=tokenizer, type=type)
    with pytest.raises(ValueError, match="parameter embed.embedding has shape"):
        export_gguf(
            dataclasses.replace(DENSE, vocab_size=641), params, buffers, tmp_path / "model.gguf", tokenizer=tokenizer
        )
    for dtype in (jnp.int8, jnp.float8_e4m3fn):
        quantised = {**params, "embed": {"embedding": jnp.zeros((640, 64), dtype)}}
        with pytest.raises(ValueError, match=f"parameter embed.embedding is {jnp.dtype(dtype).name}: it is quantised already"):
            export_gguf(DENSE, quantised, buffers, tmp_path / "model.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_refused(tokenizer, tmp_path):
    _, params, buffers = _weights(DENSE)
    export = functools.partial(export_gguf, DENSE, params, buffers, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="'Q8_O' is no type of GGUF file.*Did you mean 'Q8_0'"):
        export(tmp_path / "model.gguf", type="Q8_O")
    with pytest.raises(ValueError, match="holds a tokenizer, and none is given"):
        export(tmp_path / "model.gguf", tokenizer=None)
    with pytest.raises(FileNotFoundError, match="holds neither tokenizer.model nor tokenizer.json"):
        export(tmp_path / "model.gguf", tokenizer=tmp_path)
    with pytest.raises(ValueError, match="not on a local disk"):
        export("gs://bucket/model.gguf")
    with pytest.raises(ValueError, match="the tokenizer has 600 ids, the model tokenizer_vocab_size 599"):
        other = dataclasses.replace(DENSE, tokenizer_vocab_size=599)
        export_gguf(other, params, buffers, tmp_path / "model.gguf", tokenizer=tokenizer)
    narrow = dataclasses.replace(DENSE, mlp_dim=48)
    with pytest.raises(ValueError, match="Q4_0 stores blocks of 32 weights; rows of blk.0.ffn_down.weight have 48"):
        export_gguf(narrow, *_weights(narrow)[1:], tmp_path / "model.gguf", tokenizer=tokenizer, type="Q4_0")
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there and is no GGUF file"):
        export(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_without_the_package(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="written with the package gguf; install it"):
        export_gguf(DENSE, {}, {}, tmp_path / "model.gguf", tokenizer=tokenizer)


def test_a_full_disk_leaves_what_was_there(tokenizer, tmp_path, monkeypatch):
    """Known beforehand, met in the middle (a limit on the size of files stands for it), or only seen afterwards."""
    _, params, buffers = _weights(DENSE)
    file = export_gguf(DENSE, params, buffers, tmp_path / "model.gguf", tokenizer=tokenizer, type="Q8_0")
    before = file.read_bytes()
    export = functools.partial(export_gguf, DENSE, params, buffers, file, tokenizer=tokenizer, type="F32")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
        with pytest.raises(OSError, match=r"takes \d+ bytes and the disk has 100"):
            export()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match="could not be written .*is there room on the disk"):
            export()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "read_gguf_header", lambda _: GgufHeader({}, []))
        with pytest.raises(OSError, match="does not hold what was written"):
            export()
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
