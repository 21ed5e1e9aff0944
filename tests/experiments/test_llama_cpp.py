"""llama.cpp in a process of its own: that it is asked what is meant, and what becomes of what it cannot bear."""

import dataclasses
import functools
import importlib.util
import math

import jax
import numpy as np
import pytest

from data_pipelines import Document, TokenizerConfig, load_tokenizer, train_tokenizer
from experiments.llama_cpp import LlamaCppAnswers, run_llama_cpp
from lfm_jax.interop import gguf_file
from lfm_jax.interop.gguf_file import export_gguf
from lfm_jax.isolation.limits import LimitError
from lfm_jax.models import Decoder, ModelConfig, functional

TEXTS = [f"Line {number} says caf\u00e9 {number * 7919 % 101}.\n" * (number % 5 + 1) for number in range(60)]


@functools.cache
def _weights():
    config = ModelConfig(
        vocab_size=312, embed_dim=32, layer_types=("conv", "full_attention", "conv"), num_heads=2, num_kv_heads=1, head_dim=16,
        mlp_dim=32,
    )  # fmt: skip
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    draws = np.random.default_rng(0)
    trees = (functions.abstract_params, functions.abstract_buffers)
    draw = lambda leaf: draws.normal(size=leaf.shape).astype(np.float32) * 0.2
    return config, *(jax.tree.map(draw, tree) for tree in trees)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(TokenizerConfig(vocab_size=312), [Document(text, "a") for text in TEXTS], folder)
    return folder


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    return export_gguf(*_weights(), tmp_path_factory.mktemp("model") / "model.gguf", tokenizer=tokenizer, type="F32")


def test_every_token_has_a_log_probability(model, tokenizer):
    """Whatever it is: an end, a part of a character, a symbol; scored step by step as in the list of all, which add up to 1."""
    own = load_tokenizer(tokenizer)
    prefix = own.encode("Line 1 says")
    every = [[*prefix, index] for index in (0, 1, 2, 7, 14, 15, 15 + 0xE2, 15 + ord("a"), 300, 311)]
    answers = run_llama_cpp(model, scored=every, followed=[prefix])
    (following,) = answers.next_log_probs
    assert len(following) == own.vocab_size == 312
    assert math.fsum(map(math.exp, following)) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose([values[-1] for values in answers.log_probs], [following[row[-1]] for row in every], atol=1e-5)
    first = answers.log_probs[0][:-1]
    assert all(values[:-1] == pytest.approx(first, abs=1e-5) for values in answers.log_probs)


def test_greedy_continuations_choose_the_best_each_time(model):
    (new,) = run_llama_cpp(model, prompts=[[1, 30, 40]], new_tokens=8).continuations
    assert len(new) == 8
    steps = [[1, 30, 40, *new[:count]] for count in range(8)]
    following = run_llama_cpp(model, followed=steps).next_log_probs
    assert new == [int(np.argmax(values)) for values in following]


def test_more_sequences_than_run_at_a_time(model):
    prompts = [[1, *range(20, 20 + length)] for length in (1, 5, 3, 30, 2, 7)]
    alone = run_llama_cpp(model, prompts=prompts, new_tokens=10)
    together = run_llama_cpp(model, prompts=prompts, new_tokens=10, parallel=4, threads=2)
    assert alone.continuations == together.continuations
    assert alone.prefill_tokens_per_second > 0 and alone.decode_tokens_per_second > 0


def test_nothing_is_asked(model):
    assert run_llama_cpp(model) == LlamaCppAnswers([], [], [], [], [], None, None)


def test_perplexity_is_that_of_all_tokens():
    answers = LlamaCppAnswers([], [], [[math.log(0.5)], [math.log(0.25), math.log(0.125)]], [], [], None, None)
    assert answers.perplexity == pytest.approx(4)


def test_a_chat_is_written_by_the_files_template(model, tokenizer):
    own = load_tokenizer(tokenizer)
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "No."}, {"role": "user", "content": "Hi"},
    ]  # fmt: skip
    (ids,) = run_llama_cpp(model, chats=[messages]).chat_ids
    assert ids[0] == own.bos_id and ids.count(own.bos_id) == 1
    start, end = own.symbol_id("<|im_start|>"), own.symbol_id("<|im_end|>")
    assert ids.count(start) == 5
    # As in every server of llama.cpp, a symbol that a user spells becomes one.
    assert ids.count(end) == 5


def test_a_file_that_is_cut_off_is_refused_with_the_reason(model, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut.gguf: llama.cpp does not load it: .*data is not within the file bounds"):
        run_llama_cpp(cut)


def test_a_file_that_ends_its_process_ends_no_other(tokenizer, tmp_path, monkeypatch):
    """llama.cpp aborts at a model that has only attention, which the cache of lfm2 is not made for."""
    config, _, _ = _weights()
    only = dataclasses.replace(config, layer_types=("full_attention",))
    functions = functional(lambda rngs: Decoder(only, rngs=rngs))
    trees = (functions.abstract_params, functions.abstract_buffers)
    monkeypatch.setattr(gguf_file, "check_computable", lambda config: None)
    zeros = (jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree) for tree in trees)
    file = export_gguf(only, *zeros, tmp_path / "model.gguf", tokenizer=tokenizer, type="F32")
    with pytest.raises(LimitError, match=r"model.gguf: it ended the process that looked at it \(signal 6: .*GGML_ASSERT"):
        run_llama_cpp(file)


def test_time_is_limited(model):
    with pytest.raises(LimitError, match="more than 1 seconds of processor time"):
        run_llama_cpp(model, scored=[[1] * 5000], seconds=1)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"followed": [[1, 312]]}, "llama.cpp refuses /completion: "),
        ({"chats": [[{"role": 3}]]}, "llama.cpp refuses /apply-template: "),
    ],
)
def test_requests_that_llama_cpp_refuses(request_, reason, model):
    with pytest.raises(ValueError, match=reason):
        run_llama_cpp(model, **request_)


def test_without_the_package(model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="run with the package xllamacpp; install it"):
        run_llama_cpp(model)
