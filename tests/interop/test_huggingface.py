"""Export to and import from Hugging Face folders, judged by transformers and the safetensors package."""

import dataclasses
import errno
import json
import shutil
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from lfm_jax.generation import Engine, Request, SamplingConfig
from lfm_jax.interop import GenerationSettings, export_folder, huggingface, import_folder, read_config
from lfm_jax.models import Decoder, ModelConfig, MoEConfig, RopeConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh, parameter_sharding

DENSE = ModelConfig(
    vocab_size=80, embed_dim=32, layer_types=("conv", "full_attention", "conv"), num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, conv_bias=True,
)  # fmt: skip
MOE = dataclasses.replace(
    DENSE, moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=24, num_dense_layers=1), conv_bias=False
)
LFM3 = dataclasses.replace(
    DENSE, layer_types=("conv", "sliding_attention", "full_attention"), conv_width=7, sliding_window=4, sandwich_norms=True,
    attention_gate=True, full_rope=RopeConfig(fraction=0.5), tie_embeddings=False,
)  # fmt: skip
CONFIGS = {"dense": DENSE, "moe": MOE, "lfm3": LFM3}


def _weights(config, seed=0):
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    generator = np.random.default_rng(seed)

    def draw(leaf):
        return generator.normal(size=leaf.shape).astype(np.float32) * max(leaf.shape) ** -0.5

    return functions, *(jax.tree.map(draw, tree) for tree in (functions.abstract_params, functions.abstract_buffers))


def _logits(functions, params, buffers, tokens):
    def forward(params, buffers):
        model = functions.bind(params, buffers)
        return model.logits(model(jnp.asarray(tokens, jnp.int32)).hidden)

    return jax.jit(forward)(params, buffers)


def _load(folder, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def _assert_equal(trees, others):
    jax.tree.map(np.testing.assert_array_equal, trees, others)


@pytest.fixture
def exported(tmp_path):
    """A sharded export of the LFM3 configuration whose files a test may damage; the manifest, which would notice, is gone."""
    _, params, buffers = _weights(LFM3)
    folder = export_folder(LFM3, params, buffers, tmp_path / "hf", max_shard_bytes=20_000)
    (folder / "MANIFEST.sha256").unlink()
    return folder


def _continued(functions, config, params, buffers, prompts, count, stop_ids):
    """Greedily, by our engine."""
    sampling = SamplingConfig(max_new_tokens=count, temperature=0)
    requests = [Request(prompt=tuple(prompt), sampling=sampling, stop_ids=stop_ids) for prompt in prompts]
    return [answer.tokens for answer in Engine(functions, config, params, buffers).run(requests)]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tied_and_untied_export_full_logits(name, tied, padded, tmp_path):
    """In shards; no key is missing, unexpected or mismatched, and every row of the vocabulary has the same logit."""
    config = dataclasses.replace(CONFIGS[name], tie_embeddings=tied, tokenizer_vocab_size=70 if padded else None)
    functions, params, buffers = _weights(config)
    folder = export_folder(config, params, buffers, tmp_path / "hf", max_shard_bytes=30_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    stored = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in stored) == (not tied)
    tokens = np.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        expected = _load(folder)(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(_logits(functions, params, buffers, tokens), expected, atol=1e-5)
    imported = import_folder(folder)
    assert imported.config == config
    _assert_equal((imported.params, imported.buffers), (params, buffers))


def test_padded_vocab_export_and_never_sampled(tmp_path):
    """The padded rows would win every time; neither transformers nor our sampler takes one, and both agree greedily."""
    config = dataclasses.replace(DENSE, tokenizer_vocab_size=70, tie_embeddings=False)
    functions, params, buffers = _weights(config)
    params["lm_head"][:, 70:] += 10 * params["lm_head"][:, :10]
    params["lm_head"][:, 70:75] -= 20 * params["lm_head"][:, :5]
    folder = export_folder(config, params, buffers, tmp_path / "hf", generation=GenerationSettings(eos_ids=(69,)))
    prompt = [[1, 5, 9, 13]]
    assert np.argmax(_logits(functions, params, buffers, prompt)[0, -1]) >= 70
    theirs = _load(folder).generate(torch.tensor(prompt), attention_mask=torch.ones(1, 4), max_new_tokens=20)[0, 4:].tolist()
    assert _continued(functions, config, params, buffers, prompt, 20, (69,)) == [theirs]
    assert max(theirs) < 70


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ("conv", "conv")},
        {"layer_types": ("full_attention",), "full_rope": RopeConfig(theta=100.0, fraction=0.5)},
        {"layer_types": ("full_attention", "conv"), "attention_gate": True},
        {"moe": dataclasses.replace(MOE.moe, num_dense_layers=0)},
        {"moe": dataclasses.replace(MOE.moe, num_dense_layers=3)},
    ],
    ids=["convolutions", "attention", "gate", "experts", "no_experts"],
)
def test_unusual_architectures_generate_alike(change, tmp_path):
    config = dataclasses.replace(DENSE, **change)
    functions, params, buffers = _weights(config)
    folder = export_folder(config, params, buffers, tmp_path / "hf")
    prompt = [[1, 5, 9, 13]]
    theirs = _load(folder).generate(torch.tensor(prompt), attention_mask=torch.ones(1, 4), max_new_tokens=6)[0, 4:].tolist()
    assert _continued(functions, config, params, buffers, prompt, 6, (7, 2)) == [theirs]
    assert read_config(folder) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_batch_of_unequal_prompts_equals_transformers(name, tmp_path):
    """Ours in one left-padded batch, theirs prompt by prompt; rows end with their first stop token, at different lengths."""
    config = CONFIGS[name]
    functions, params, buffers = _weights(config)
    model = _load(export_folder(config, params, buffers, tmp_path / "hf"))
    prompts, new = [[1, 5, 9, 13], [1], [1, 40, 41, 42, 43, 44, 45, 46, 47], [1, 7]], 12

    def theirs(prompt, stop_ids):
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": stop_ids, "pad_token_id": 0}
        tokens = torch.tensor([prompt])
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(prompt) :].tolist()

    unstopped = [theirs(prompt, [-1]) for prompt in prompts]
    stop_ids = (unstopped[0][4], unstopped[2][7])
    expected = [theirs(prompt, list(stop_ids)) for prompt in prompts]
    assert len(set(map(len, expected))) > 1 and min(map(len, expected)) < new
    assert _continued(functions, config, params, buffers, prompts, new, stop_ids) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_export_rounds_each_weight_once(name, tmp_path):
    config = CONFIGS[name]
    _, params, buffers = _weights(config)
    folder = export_folder(config, params, buffers, tmp_path / "hf", dtype="bfloat16")
    assert {tensor.dtype for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items()
            if "expert_bias" not in name} == {torch.bfloat16}  # fmt: skip
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    imported = import_folder(folder)
    _assert_equal((imported.params, imported.buffers), (rounded, buffers))
    assert {leaf.dtype for leaf in jax.tree.leaves(imported.params)} == {np.dtype(np.float32)}
    assert _load(folder, dtype="auto").dtype == torch.bfloat16


def test_half_precision_checkpoints_import(tmp_path):
    _, params, buffers = _weights(DENSE)
    folder = export_folder(DENSE, params, buffers, tmp_path / "hf")
    (folder / "MANIFEST.sha256").unlink()
    file = folder / "model.safetensors"
    safetensors.torch.save_file({n: t.half() for n, t in safetensors.torch.load_file(file).items()}, file)
    expected = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), params)
    _assert_equal(import_folder(folder).params, expected)


@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_export_does_not_mutate_source(kind, tmp_path):
    _, params, buffers = _weights(MOE)
    params, buffers = jax.tree.map(jnp.asarray if kind == "jax" else np.array, (params, buffers))
    before = jax.tree.map(np.array, (params, buffers))
    export_folder(MOE, params, buffers, tmp_path / "hf", dtype="bfloat16")
    _assert_equal((params, buffers), before)


def test_sharded_parameters_leave_and_enter_a_mesh(tmp_path):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    functions, params, buffers = _weights(MOE)

    def place(path, array):
        axes = functions.param_axes if path[-1] != "expert_bias" else functions.buffer_axes
        for key in path:
            axes = axes[key]
        return jax.device_put(array, parameter_sharding(mesh, axes, array.shape))

    placed = jax.tree_util.tree_map_with_path(lambda path, leaf: place([key.key for key in path], leaf), params)
    folder = export_folder(MOE, placed, buffers, tmp_path / "hf")
    imported = import_folder(folder, place=place)
    _assert_equal(imported.params, params)
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, source: leaf.sharding == source.sharding, imported.params, placed)))
    assert len(imported.params["layers"][0]["mlp"]["gate"].sharding.device_set) == 8


def test_export_and_import_work_without_torch(tmp_path, monkeypatch):
    _, params, buffers = _weights(MOE)
    for package in ("torch", "transformers", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    folder = export_folder(MOE, params, buffers, tmp_path / "hf", dtype="bfloat16", max_shard_bytes=30_000)
    assert import_folder(folder).config == MOE


def _peak(action):
    tracemalloc.start()
    action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_export_and_import_stream(tmp_path, monkeypatch):
    """NumPy's memory beyond the model: less than its largest tensor to export from the host, one to export from a device (which
    a copy stands for here), and the tensor read besides the parameter made of it to import."""
    monkeypatch.setattr("lfm_jax.interop.safetensors_io._BLOCK_BYTES", 1 << 16)
    config = dataclasses.replace(DENSE, embed_dim=256, vocab_size=4000, mlp_dim=1024, layer_types=("conv",) * 8)
    _, params, buffers = _weights(config)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert total > 8 * largest
    assert _peak(lambda: export_folder(config, params, buffers, tmp_path / "hf")) < largest
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "on_host", np.array)
        assert _peak(lambda: export_folder(config, params, buffers, tmp_path / "hf")) < 1.5 * largest
    assert _peak(lambda: import_folder(tmp_path / "hf", place=lambda path, array: path)) < 2.25 * largest


def _full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch):
    _, params, buffers = _weights(DENSE)
    folder = export_folder(DENSE, params, buffers, tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "write_safetensors", _full_disk)
        for name in ("hf", "new"):
            told = rf"{name} was not written, and nothing is left of it \(No space left on device\); is there room on the disk\?"
            with pytest.raises(OSError, match=told) as full:
                export_folder(DENSE, params, buffers, tmp_path / name)
            assert full.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
    _assert_equal(import_folder(folder).params, params)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    export_folder(DENSE, other, buffers, folder)
    _assert_equal(import_folder(folder).params, other)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_an_export_that_is_refused_late_leaves_nothing(tmp_path, monkeypatch):
    _, params, buffers = _weights(DENSE)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "write_tokenizer", lambda *_: 81)
        with pytest.raises(ValueError, match="the tokenizer has 81 ids, the model vocab_size 80"):
            export_folder(DENSE, params, buffers, tmp_path / "hf", tokenizer="any")
    with pytest.raises(FileNotFoundError, match="nowhere is missing; expected a SentencePiece model"):
        export_folder(DENSE, params, buffers, tmp_path / "hf", tokenizer=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_check_sees_the_whole_folder_before_it_has_its_name(tmp_path):
    _, params, buffers = _weights(DENSE)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    seen = []

    def refuse(folder):
        seen.append(import_folder(folder).params)
        raise ValueError("is another model")

    folder = export_folder(
        DENSE, params, buffers, tmp_path / "hf", check=lambda folder: seen.append(import_folder(folder).params)
    )
    for place in (folder, tmp_path / "new"):
        with pytest.raises(ValueError, match="is another model"):
            export_folder(DENSE, other, buffers, place, check=refuse)
    _assert_equal(seen, [params, other, other])
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
    _assert_equal(import_folder(folder).params, params)


def test_a_folder_that_is_no_export_is_not_overwritten(tmp_path):
    _, params, buffers = _weights(DENSE)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no earlier export"):
        export_folder(DENSE, params, buffers, tmp_path)


def _edit(folder, edit):
    """Rewrites all shards as one file after `edit` changed the dict of tensors."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


W1 = "model.layers.1.feed_forward.w1.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(W1), rf"tensor '{W1}' is missing \(1 of 44\)"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), r"tensor 'extra' has no place .*\(1 such tensors\)"),
        (lambda tensors: tensors.update({W1: tensors[W1][1:].clone()}), rf"'{W1}' has shape \(47, 32\), .* means \(48, 32\)"),
        (lambda tensors: tensors.update({W1: tensors[W1].T.contiguous()}), rf"'{W1}' has shape \(32, 48\)"),
        (lambda tensors: tensors.update({W1: tensors[W1].to(torch.int8)}), rf"'{W1}' has dtype I8"),
        (lambda tensors: tensors.update({W1.replace("1.weight", "1.bias"): torch.zeros(48)}), "w1.bias' has no place"),
    ],
    ids=["missing", "extra", "short", "transposed", "int8", "bias"],
)
def test_bad_tensors_are_named(edit, message, exported):
    _edit(exported, edit)
    with pytest.raises(ValueError, match=message):
        import_folder(exported)


def test_both_names_of_the_gate_are_read(exported):
    expected = import_folder(exported)

    def rename(tensors):
        gates = [name for name in tensors if "gate_proj" in name]
        assert len(gates) == 2
        tensors.update({name.replace("gate_proj", "g_proj"): tensors.pop(name) for name in gates})

    _edit(exported, rename)
    _assert_equal(import_folder(exported).params, expected.params)


def test_a_repeated_tied_head_is_accepted_only_if_it_is_the_embedding(tmp_path):
    _, params, buffers = _weights(DENSE)
    folder = export_folder(DENSE, params, buffers, tmp_path / "hf")
    (folder / "MANIFEST.sha256").unlink()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    _assert_equal(import_folder(folder).params, params)
    tensors["lm_head.weight"][3, 3] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        import_folder(folder)


def test_a_missing_shard_is_named_with_a_tensor_of_it(exported):
    (exported / "model-00002-of-00007.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard 'model-00002-of-00007.safetensors' is missing, which should hold model"):
        import_folder(exported)


def test_a_truncated_shard_is_noticed(exported):
    file = exported / "model-00002-of-00007.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="00002-of-00007.safetensors: cut off: tensor 'model.layers"):
        import_folder(exported)


def _index(folder, edit):
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda index: index.pop("weight_map"), ValueError, "weight_map must map"),
        (lambda index: index["weight_map"].update(x="model-00001-of-00007.safetensors"), ValueError, "'x' is not in model-00001"),
        (lambda index: index["weight_map"].pop(W1), ValueError, f"'{W1}' is in model-00004-of-00007.safetensors, but not"),
        (lambda index: index["weight_map"].update(x="../hf/model-00001-of-00007.safetensors"), FileNotFoundError, "shard '../hf"),
    ],
    ids=["none", "absent", "unlisted", "outside"],
)
def test_a_wrong_index_is_refused(edit, error, message, exported):
    _index(exported, edit)
    with pytest.raises(error, match=message):
        import_folder(exported)


def test_shards_without_their_index_are_refused(exported):
    (exported / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"only shards \(model-00001-of-00007.safetensors, .*index is missing"):
        import_folder(exported)
    for file in exported.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor .*, no other .safetensors file"):
        import_folder(exported)


def test_a_folder_without_a_readable_config_is_refused(exported):
    (exported / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        import_folder(exported)
    (exported / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        import_folder(exported)
    (exported / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        import_folder(exported)


def test_a_config_that_is_far_from_the_weights_is_refused_before_anything_is_built(exported):
    config = json.loads((exported / "config.json").read_text())
    changed = config | {"layer_types": ["conv"] * 100, "num_hidden_layers": 100}
    (exported / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="config.json has 100 layers and 0 experts, but only 44 tensors are there"):
        import_folder(exported)
    (exported / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json is no JSON: maximum recursion"):
        import_folder(exported)


def test_json_too_long_for_a_model_is_not_parsed(exported, monkeypatch):
    monkeypatch.setattr(huggingface, "_MOST_JSON_BYTES", 100)
    with pytest.raises(ValueError, match=r"config.json has \d+ bytes, more than 100: it is damaged or hostile"):
        read_config(exported)


def test_an_unknown_model_type_names_the_nearest(exported):
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"model_type": "lfm33"}))
    with pytest.raises(ValueError, match="model_type 'lfm33' .* Did you mean 'lfm3'"):
        read_config(exported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params["layers"][0].pop("mlp"), r"layers.0.mlp.* is missing; the configuration wants shape"),
        (lambda params: params.update(extra=np.zeros(2)), "parameter extra has no place"),
        (lambda params: params["layers"][1]["moe"].update(gate=np.zeros((3, 32, 24))), r"layers.1.moe.gate has shape \(3, 32"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_parameters_of_another_configuration_are_not_exported(change, message, tmp_path):
    _, params, buffers = _weights(MOE)
    change(params)
    with pytest.raises(ValueError, match=message):
        export_folder(MOE, params, buffers, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_unknown_dtype_is_refused(tmp_path):
    _, params, buffers = _weights(DENSE)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'float16'"):
        export_folder(DENSE, params, buffers, tmp_path / "hf", dtype="float16")


def test_tokenizer_json_tells_the_real_ids(exported):
    """A folder from the hub says nothing of padding; its tokenizer does."""
    config = json.loads((exported / "config.json").read_text())
    del config["tokenizer_vocab_size"]
    (exported / "config.json").write_text(json.dumps(config))
    vocab = {f"token{index}": index for index in range(60)}
    tokenizer = {"model": {"vocab": vocab}, "added_tokens": [{"id": 64, "content": "<|x|>"}]}
    (exported / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert import_folder(exported).config == dataclasses.replace(LFM3, tokenizer_vocab_size=65)
    tokenizer["added_tokens"][0]["id"] = 80
    (exported / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizer.json knows 81 ids, but config.json has vocab_size 80"):
        read_config(exported)


def test_a_folder_may_lie_anywhere(exported, tmp_path):
    """Nothing in it depends on its name."""
    shutil.move(exported, tmp_path / "elsewhere")
    assert import_folder(str(tmp_path / "elsewhere")).config == LFM3
