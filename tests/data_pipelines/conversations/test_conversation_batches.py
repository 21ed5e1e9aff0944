"""Batches of conversations: every answer once, cut and counted, the same loss packed and padded, and resumed on other hosts."""

import collections
import dataclasses
import functools
import json
import pickle
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import LoaderConfig, StageConfig
from data_pipelines.conversations import (
    Examples,
    PackedConversations,
    conversation_batches,
    conversation_evaluation_batches,
)
from lfm_jax.models import Decoder, ModelConfig, functional
from lfm_jax.training import LossConfig, next_token_objective

SEQ = 12
TOKENIZER = SimpleNamespace(fingerprint="f" * 64, bos_id=1, eos_id=2, pad_id=0)
ONE_HOST = {"process_index": 0, "process_count": 1}


def _examples(lengths, seed=0, tokenizer=TOKENIZER.fingerprint):
    """Texts of these lengths, in which some ids behind the first are trained, the last always."""
    random = np.random.default_rng(seed)
    found = []
    for length in lengths:
        trained = random.random(length) < 0.4
        trained[0], trained[-1] = False, True
        found.append((np.concatenate([[1], random.integers(10, 50, length - 1)]), trained))
    return Examples(found, conversations=len(found), refused=0, tokenizer=tokenizer)


def _joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _trained_pairs(batches):
    pairs = collections.Counter()
    for batch in batches:
        counts = batch["loss_mask"] > 0
        pairs.update(zip(batch["tokens"][counts].tolist(), batch["targets"][counts].tolist(), strict=True))
    return pairs


def test_a_row_by_hand():
    examples = Examples(
        [(np.array([1, 21, 22, 23]), np.array([False, False, True, True])), (np.array([1, 31]), np.array([False, True]))],
        conversations=2, refused=0, tokenizer=TOKENIZER.fingerprint,
    )  # fmt: skip
    ((batch,),) = [list(conversation_evaluation_batches(examples, TOKENIZER, seq_len=5, batch_size=1, **ONE_HOST))]
    assert {name: array[0].tolist() for name, array in batch.items()} == {
        "tokens": [1, 21, 22, 1, 0], "targets": [21, 22, 23, 31, 0], "segment_ids": [1, 1, 1, 2, 0], "positions": [0, 1, 2, 0, 0],
        "loss_mask": [0, 1, 1, 1, 0],
    }  # fmt: skip
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "targets": "int32", "segment_ids": "int32", "positions": "int32", "loss_mask": "float32",
    }  # fmt: skip


def test_what_is_too_long_is_cut_and_what_then_says_nothing_is_dropped_and_counted():
    late = np.zeros(20, bool)
    late[14:] = True
    early = np.zeros(16, bool)
    early[[3, 15]] = True
    edge = np.zeros(14, bool)
    edge[12] = True  # the last target of a row
    lengths = {"late": 20, "early": 16, "edge": 14, "whole": 13}
    trained = {"late": late, "early": early, "edge": edge, "whole": np.arange(13) > 11}
    several = [(np.arange(length) + 100 * number, trained[name]) for number, (name, length) in enumerate(lengths.items(), 1)]
    packed = PackedConversations(Examples(several, conversations=4, refused=0, tokenizer=""), SEQ)
    assert (packed.truncated, packed.cut_tokens, packed.dropped) == (3, 7 + 3 + 1, 1)
    rows = [packed.examples_of(row) for row in range(len(packed.packing(0)))]
    kept = sorted((ids.tolist(), trained.tolist()) for row in rows for ids, trained in row)
    assert kept == [(ids[:13].tolist(), trained[:13].tolist()) for ids, trained in several[1:]]
    with pytest.raises(ValueError, match="no example has an answer in its first 2 tokens; raise seq_len"):
        PackedConversations(Examples(several, conversations=4, refused=0, tokenizer=""), 2)


def test_rows_are_the_same_in_another_process():
    packed = PackedConversations(_examples([*range(2, 20)]), SEQ)
    again = pickle.loads(pickle.dumps(packed))
    assert again.fingerprint == packed.fingerprint
    for row in range(len(packed.packing(0))):
        for one, other in zip(packed.examples_of(row), again.examples_of(row), strict=True):
            np.testing.assert_array_equal(one, other)


def test_every_answer_comes_once_in_an_epoch():
    examples = _examples([*range(2, 12)] * 4)
    expected = collections.Counter()
    for number in range(len(examples)):
        ids, trained = examples[number]
        expected.update(zip(ids[:-1][trained[1:]].tolist(), ids[1:][trained[1:]].tolist(), strict=True))
    config = LoaderConfig(seq_len=SEQ, batch_size=4, epochs=2)
    batches = list(conversation_batches([examples], config, TOKENIZER, **ONE_HOST))
    assert _trained_pairs(batches) == expected + expected
    once = conversation_evaluation_batches(examples, TOKENIZER, seq_len=SEQ, batch_size=4, **ONE_HOST)
    assert _trained_pairs(once) == expected
    assert len(once) < len(batches) < 2 * 4 * 10 / 4  # several are in a row


def _mixed(hosts=1, host=0, seed=3, batch_size=8):
    sources = [_examples([7] * 50, seed=1), _examples([*range(2, 13)] * 6, seed=2)]
    stages = (StageConfig(from_step=4, weights=(1.0, 1.0), seq_len=8),)
    config = LoaderConfig(seq_len=SEQ, batch_size=batch_size, weights=(3.0, 1.0), stages=stages, seed=seed)
    return conversation_batches(sources, config, TOKENIZER, process_index=host, process_count=hosts)


def test_batches_are_the_same_on_any_number_of_hosts_and_go_on_where_they_were():
    """Through a change of weights and of the rows' length."""
    alone = _mixed()
    expected, states = [], []
    for _ in range(7):
        states.append(json.loads(json.dumps(alone.get_state())))
        expected.append(next(alone))
    assert [batch["tokens"].shape for batch in expected] == [(8, SEQ)] * 4 + [(8, 8)] * 3
    hosts = [_mixed(2, host) for host in range(2)]
    for host in hosts:
        host.set_state(states[2])
    for batch in expected[2:]:
        joined = _joined([next(host) for host in hosts])
        for name, array in batch.items():
            np.testing.assert_array_equal(joined[name], array, err_msg=name)
    assert [share.count for share in alone.shares(0)] == [6, 2]
    other = next(_mixed(seed=4))
    assert (other["tokens"] != expected[0]["tokens"]).any()
    with pytest.raises(ValueError, match="the state is of other batches: seed was 3, is 4"):
        _mixed(seed=4).set_state(states[2])
    for batches in (alone, *hosts):
        batches.close()


def test_the_state_is_of_these_conversations():
    config = LoaderConfig(seq_len=SEQ, batch_size=2)
    state = conversation_batches([_examples([5] * 9)], config, TOKENIZER, **ONE_HOST).get_state()
    with pytest.raises(ValueError, match="the state is of other batches: rows was"):
        conversation_batches([_examples([5] * 9, seed=1)], config, TOKENIZER, **ONE_HOST).set_state(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "difficulty"}, "come shuffled and as they are, not with order 'difficulty' and fill_in_the_middle 0.0"),
        ({"fill_in_the_middle": 0.5}, "not with order 'shuffled' and fill_in_the_middle 0.5"),
        ({"weights": (1.0, 2.0)}, "weights .* are for 2 sources, and there are 1"),
        ({"batch_size": 3}, "batch_size 3 is no multiple of the 2 hosts"),
    ],
)
def test_what_conversations_do_not_have_is_refused(changes, message):
    config = dataclasses.replace(LoaderConfig(seq_len=SEQ, batch_size=2), **changes)
    with pytest.raises(ValueError, match=message):
        conversation_batches([_examples([5])], config, TOKENIZER, process_index=0, process_count=2)


def test_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="were encoded by the tokenizer other, not by ffffffffffff; encode them again"):
        conversation_evaluation_batches(_examples([5], tokenizer="other"), TOKENIZER, seq_len=SEQ, batch_size=1, **ONE_HOST)


CONFIG = ModelConfig(
    vocab_size=61, tokenizer_vocab_size=50, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1,
    head_dim=8, mlp_dim=24,
)  # fmt: skip
ROWS = 8


@functools.cache
def _sums_and_gradient():
    """A function of a batch of ROWS rows of SEQ."""
    functions = functional(lambda rngs: Decoder(CONFIG, rngs=rngs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), functions.abstract_params)
    buffers = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), functions.abstract_buffers)

    def loss(params, batch):
        sums = next_token_objective(LossConfig())(functions.bind(params, buffers), batch, jax.random.key(0))
        return sums.loss, sums

    compiled = jax.jit(jax.grad(loss, has_aux=True))
    return lambda batch: compiled(params, jax.tree.map(jnp.asarray, batch))


def _assert_same(ours, theirs):
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1e-3, np.abs(b).max()))
    jax.tree.map(near, ours, theirs)


def _packed_batch():
    examples = _examples([3, 4, 5, 6, 7, 2, 9, 12])
    (packed,) = conversation_evaluation_batches(examples, TOKENIZER, seq_len=SEQ, batch_size=ROWS, **ONE_HOST)
    assert (packed["segment_ids"].max(axis=1) > 1).sum() > 1
    return examples, packed


def test_packed_equals_padded_in_loss_and_gradient():
    examples, packed = _packed_batch()
    padded = {name: np.zeros_like(array) for name, array in packed.items()}
    for number in range(len(examples)):
        ids, trained = examples[number]
        here = slice(len(ids) - 1)
        for name, value in zip(padded, (ids[:-1], ids[1:], 1, np.arange(len(ids) - 1), trained[1:]), strict=True):
            padded[name][number, here] = value
    assert list(padded) == ["tokens", "targets", "segment_ids", "positions", "loss_mask"]
    _assert_same(_sums_and_gradient()(packed), _sums_and_gradient()(padded))


def test_what_is_not_said_by_an_assistant_is_not_learnt():
    """Other targets where nothing is trained change neither loss nor gradient; where something is, they change both."""
    _, packed = _packed_batch()
    random = np.random.default_rng(1)
    others = random.integers(10, 50, packed["targets"].shape).astype(np.int32)
    untrained = packed["loss_mask"] == 0
    expected, changed = (
        _sums_and_gradient()(packed | {"targets": np.where(where, others, packed["targets"])}) for where in (False, untrained)
    )
    assert (untrained & (packed["segment_ids"] > 0)).sum() > 5
    _assert_same(changed, expected)
    (different, _) = _sums_and_gradient()(packed | {"targets": np.where(untrained, packed["targets"], others)})
    assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(jax.tree.leaves(different), jax.tree.leaves(expected[0]), strict=True))
