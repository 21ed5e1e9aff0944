"""A row for people: the text comes back, and exactly what is trained is marked as such."""

import numpy as np
import pytest

from data_pipelines import Document, TokenizerConfig, train_tokenizer
from data_pipelines.conversations import (
    CHAT_FORMATS,
    Conversation,
    conversation_evaluation_batches,
    describe_row,
    encode_conversations,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return train_tokenizer(TokenizerConfig(vocab_size=290), [Document("user assistant Hello " * 50, "")], folder)


@pytest.fixture(scope="module")
def row(tokenizer):
    chats = [
        [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "caf\u00e9"}],
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}],
    ]
    examples = encode_conversations([Conversation(messages) for messages in chats], tokenizer, CHAT_FORMATS["lfm2"])
    (batch,) = conversation_evaluation_batches(
        examples, tokenizer, seq_len=100, batch_size=1, process_index=0, process_count=1
    )
    return {name: array[0] for name, array in batch.items()}


def _parts(text, word):
    """The characters with a style that has the word in it."""
    return [text.plain[span.start : span.end] for span in text.spans if word in str(span.style).split()]


def test_the_text_comes_back_with_its_symbols(row, tokenizer):
    text = describe_row(row, tokenizer)
    shown = sorted(text.plain.split("<|startoftext|>")[1:])
    padding = int((row["segment_ids"] == 0).sum())
    first = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    second = "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\ncaf\u00e9<|im_end|>\n"
    assert sorted(part.replace(f"[{padding} of padding]", "") for part in shown) == sorted([first, second])
    assert text.plain.endswith(f"[{padding} of padding]")


def test_what_is_trained_is_marked(row, tokenizer):
    text = describe_row(row, tokenizer)
    assert sorted(_parts(text, "green")) == ["<|im_end|>", "<|im_end|>", "caf\u00e9"]
    assert len(_parts(text, "reverse")) == 2 * 5  # a spelled symbol is none
    assert int(row["loss_mask"].sum()) == len(tokenizer.encode("caf\u00e9")) + 2


def test_a_part_of_a_row_can_be_shown(row, tokenizer):
    shown = describe_row(row, tokenizer, most=2).plain
    assert shown.startswith("<|startoftext|><|im_start|>")
    assert describe_row(row, tokenizer).plain.startswith(shown.rstrip("\n"))
    padding = {name: np.zeros_like(array) for name, array in row.items()}
    assert describe_row(padding, tokenizer).plain == "[100 of padding]"
