"""Pairs of answers: what may be written, what is put aside, and which ids of the two answers are trained."""

import json

import numpy as np
import pytest

from data_pipelines import Document, LoaderConfig, Quarantine, TokenizerConfig, train_tokenizer
from data_pipelines.conversations import (
    CHAT_FORMATS,
    Conversation,
    ConversationEncoder,
    ConversationsConfig,
    JinjaTemplate,
    PairRows,
    encode_preferences,
    preference_batches,
    read_preferences,
)

ASKED = [{"role": "user", "content": "One or two?"}]
SAID = [{"role": "assistant", "content": "Two."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = "user assistant One or two? Two. one more number please " * 40
    return train_tokenizer(TokenizerConfig(vocab_size=300), [Document(text, "a")], tmp_path_factory.mktemp("pairs") / "tokenizer")


def _read(tmp_path, records, quarantine=None):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_preferences(ConversationsConfig(source=str(tmp_path), held_out_share=0), "train", quarantine))


def test_all_ways_to_write_a_pair_are_the_same_pair(tmp_path):
    records = [
        {"prompt": ASKED, "chosen": SAID, "rejected": [{"role": "assistant", "content": "one"}]},
        {"prompt": "One or two?", "chosen": "Two.", "rejected": "one"},
        {"messages": ASKED, "chosen": ASKED + SAID, "rejected": [*ASKED, {"role": "assistant", "content": "one"}]},
        {"chosen": ASKED + SAID, "rejected": [*ASKED, {"role": "assistant", "content": "one"}]},
    ]
    found = [(pair.prompt.messages, pair.chosen.messages, pair.rejected.messages) for pair in _read(tmp_path, records)]
    assert found[0] == (ASKED, ASKED + SAID, [*ASKED, {"role": "assistant", "content": "one"}]) and found == found[:1] * 4


@pytest.mark.parametrize(
    "record, reason",
    [
        ([], "no_object"),
        ({"prompt": ASKED, "chosen": "a"}, "no_field"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "no_field"),
        ({"prompt": ASKED, "chosen": "a", "rejected": "a"}, "no_pair"),
        ({"prompt": ASKED + SAID, "chosen": "a", "rejected": "b"}, "no_pair"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "no_pair"),
        ({"prompt": ASKED, "chosen": ASKED, "rejected": "b"}, "no_pair"),
        ({"prompt": ASKED, "chosen": [{"role": "robot", "content": "a"}], "rejected": "b"}, "no_message"),
    ],
)
def test_bad_records_are_put_aside(tmp_path, record, reason):
    good = {"prompt": ASKED, "chosen": "a", "rejected": "b"}
    with Quarantine(tmp_path / "quarantine") as quarantine:
        assert len(_read(tmp_path, [good, record], quarantine)) == 1
    assert quarantine.counts.bad == {reason: 1}


def test_ids_are_those_of_conversations_and_the_answer_alone_is_trained(tmp_path, tokenizer):
    prompt = ASKED + SAID + [{"role": "user", "content": "one more number please"}]
    pairs = _read(tmp_path, [{"prompt": prompt, "chosen": "Two. Two.", "rejected": "one"}])
    examples = encode_preferences(pairs, tokenizer, CHAT_FORMATS["lfm2"])
    encoder = ConversationEncoder(tokenizer, CHAT_FORMATS["lfm2"])
    (asked,) = encoder.prompts([Conversation(prompt)])
    for number, answer in enumerate(("Two. Two.", "one")):
        ((expected, _),) = encoder.examples([Conversation([*prompt, {"role": "assistant", "content": answer}])])[0]
        ids, trained = examples[number]
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(trained, np.arange(len(ids)) >= len(asked))  # its first token and the one that ends it


def test_batches_have_both_answers_of_a_pair_and_go_on_where_they_were(tmp_path, tokenizer):
    records = [{"prompt": ASKED, "chosen": "Two. " * n, "rejected": "one " * n} for n in range(1, 9)]
    examples = encode_preferences(_read(tmp_path, records), tokenizer, CHAT_FORMATS["lfm2"])
    rows = PairRows(examples, 40, tokenizer)
    rows = rows.with_reference(np.arange(rows.counts.sum(), dtype=np.float32), "reference")
    config = LoaderConfig(seq_len=40, batch_size=4, epochs=2)
    batches = preference_batches([rows], config)
    first, state = next(batches), batches.get_state()
    rest = list(batches)
    batches.set_state(state)
    for one, other in zip(rest, batches, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    known = {int(start): tuple(count) for start, count in zip(rows._first[::2], rows.counts, strict=True)}
    for row in range(4):
        mask, other = first["loss_mask"][row] > 0, first["rejected_loss_mask"][row] > 0
        values = np.concatenate([first["reference_log_probs"][row][mask], first["rejected_reference_log_probs"][row][other]])
        np.testing.assert_array_equal(np.diff(values), 1)
        assert known[int(values[0])] == (mask.sum(), other.sum())
    with pytest.raises(ValueError, match="expected .* log-probabilities, one a trained target"):
        rows.with_reference(np.zeros(1, np.float32), "")
    with pytest.raises(ValueError, match="pairs have one length all the time, not 40, 80"):
        preference_batches([rows], LoaderConfig(seq_len=80, batch_size=4))
    with pytest.raises(ValueError, match="pairs come shuffled and as they are, not with order 'difficulty'"):
        preference_batches([rows], LoaderConfig(seq_len=40, batch_size=4, order="difficulty"))


def test_sources_of_other_files_and_splits_without_a_pair_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(ValueError, match="holds text.txt; pairs are read from .jsonl"):
        list(read_preferences(ConversationsConfig(source=str(tmp_path)), "train"))
    (tmp_path / "text.txt").unlink()
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": ASKED, "chosen": "a", "rejected": "b"}))
    with pytest.raises(ValueError, match="no pair of source .* is in the 'held_out' split with held_out_share 0"):
        list(read_preferences(ConversationsConfig(source=str(tmp_path), held_out_share=0), "held_out"))


def test_pairs_that_the_template_cannot_write_are_put_aside_or_refused(tmp_path, tokenizer):
    refuses = JinjaTemplate(
        source="{% for m in messages %}{% if m.content == 'one' %}{{ raise_exception('no') }}{% endif %}<|im_start|>"
        "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    pairs = _read(tmp_path, [{"prompt": ASKED, "chosen": "Two.", "rejected": other} for other in ("one", "more")])
    with Quarantine(tmp_path / "refused") as quarantine:
        examples = encode_preferences(pairs, tokenizer, refuses, quarantine)
    assert len(examples) == 2 and (examples.conversations, examples.refused) == (1, 1) and quarantine.counts.bad == {"refused": 1}
    with pytest.raises(ValueError, match="pairs.jsonl:1: .*no"):
        encode_preferences(pairs, tokenizer, refuses)
    nothing = "there is no pair to learn from, of 1 with 1 refused"
    with Quarantine(tmp_path / "all") as quarantine, pytest.raises(ValueError, match=nothing):
        encode_preferences(pairs[:1], tokenizer, refuses, quarantine)
    several = [*SAID, {"role": "user", "content": "more"}, {"role": "assistant", "content": "one"}]
    forgets = CHAT_FORMATS["lfm2_5"]
    thinking = [{"role": "assistant", "content": "<think>one</think>Two."}, *several[1:]]
    with pytest.raises(ValueError, match="the template writes the answer in . texts that begin with the prompt"):
        encode_preferences(_read(tmp_path, [{"prompt": ASKED, "chosen": thinking, "rejected": "one"}]), tokenizer, forgets)


def test_ids_of_another_tokenizer_are_refused(tmp_path, tokenizer):
    examples = encode_preferences(
        _read(tmp_path, [{"prompt": ASKED, "chosen": "Two.", "rejected": "one"}]), tokenizer, CHAT_FORMATS["lfm2"]
    )
    other = train_tokenizer(TokenizerConfig(vocab_size=288), [Document("one two " * 99, "a")], tmp_path / "other")
    with pytest.raises(ValueError, match="the pairs were encoded by the tokenizer .*, not by .*; encode them again"):
        PairRows(examples, 40, other)
    with pytest.raises(ValueError, match="no pair has of both answers something in their first 2 tokens; raise seq_len"):
        PairRows(examples, 2, tokenizer)
