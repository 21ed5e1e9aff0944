"""The difficulty: probabilities by their formula, and an order that a reader would agree with."""

import collections
import math
import random

import numpy as np
import pytest
from etils import epath

from data_pipelines import Document, DocumentsConfig, read_documents
from data_pipelines.preparation import difficulty
from data_pipelines.preparation.difficulty import ByteTrigramModel, DifficultyConfig, sample_texts

TEXTS = ["the cat sat on the mat\n\nthe dog", "a cat and a dog, the end", "caf\u00e9 caf\u00e9\n\n\nof the cat"]


@pytest.fixture(scope="module")
def model():
    return ByteTrigramModel.fit(TEXTS)


def test_the_probabilities_after_any_two_bytes_sum_to_one(model):
    sums = np.exp2(-model.bits.astype(np.float64)).sum(axis=-1)
    np.testing.assert_allclose(sums, 1, atol=2e-5)
    assert model.bits.shape == (256, 256, 256) and model.bits.dtype == np.float32


def plain_probability(order):
    """p(byte | context) by dictionaries: the formula written out again, on contexts of `order` bytes."""
    counts = collections.defaultdict(collections.Counter)
    for text in TEXTS:
        content = b"\n\n" + text.encode()
        for at in range(2, len(content)):
            counts[content[at - order : at]][content[at]] += 1
    entries = [count for follow in counts.values() for count in follow.values()]
    once, twice = entries.count(1) + 0.5, entries.count(2) + 0.5
    discount = once / (once + 2 * twice)
    lower = plain_probability(order - 1) if order else lambda byte, context: 1 / 256

    def probability(byte, context):
        shorter = lower(byte, context[1:])
        follow = counts.get(context[len(context) - order :])
        if follow is None:
            return shorter
        total = sum(follow.values())
        return (max(follow[byte] - discount, 0) + discount * len(follow) * shorter) / total

    return probability


def test_bits_per_byte_are_those_of_the_formula(model):
    probability = plain_probability(2)
    for text in ("the cat", "x", "zebra \u4f60", TEXTS[0]):
        content = b"\n\n" + text.encode()
        bits = [-math.log2(probability(content[at], content[at - 2 : at])) for at in range(2, len(content))]
        assert model.bits_per_byte(text) == pytest.approx(sum(bits) / len(bits), rel=1e-5)


def test_a_long_text_is_rated_in_pieces_to_the_same_end(model, monkeypatch):
    text = "the cat sat on a caf\u00e9 " * 10
    expected = model.bits_per_byte(text)
    for size in (1, 2, 7):
        monkeypatch.setattr(difficulty, "_CHUNK_BYTES", size)
        assert model.bits_per_byte(text) == pytest.approx(expected, rel=1e-12)


def test_without_a_text_every_byte_is_as_likely():
    assert ByteTrigramModel.fit([]).bits_per_byte("any") == 8.0


def test_a_saved_model_is_the_same(model, tmp_path):
    model.save(epath.Path(tmp_path) / "bits.npy")
    assert (ByteTrigramModel.load(epath.Path(tmp_path) / "bits.npy").bits == model.bits).all()


def test_the_sample_is_bounded_in_order_and_the_same_each_time(monkeypatch):
    monkeypatch.setattr(difficulty, "_SAMPLE_CHARACTERS", 10)
    documents = [Document("".join(random.Random(at).choices("abc\u00e9", k=35)), f"d{at}") for at in range(200)]
    parts = [document.text[at : at + 10] for document in documents for at in range(0, 35, 10)]
    assert list(sample_texts(documents, 1 << 20)) == parts
    sample = list(sample_texts(documents, 2000))
    assert sample == list(sample_texts(iter(documents), 2000))
    assert 1900 < sum(len(part.encode()) for part in sample) <= 2000
    places = [parts.index(part) for part in sample if len(part) == 10]
    assert places == sorted(places)
    # A fair share of either half, four standard deviations around it.
    assert abs(sum(place < 400 for place in places) / len(places) - 0.5) < 4 * 0.5 / math.sqrt(len(places))


def test_real_text_is_ordered_as_a_reader_would(published_data):
    """Prose like that of the corpus, then code, another language, its letters shuffled, random letters, random bytes as text."""
    books = DocumentsConfig(source=str(published_data / "books" / "train-00.jsonl.zst"), held_out_share=1.0)
    validation = DocumentsConfig(source=str(published_data / "books" / "validation.jsonl.zst"), held_out_share=1.0)
    texts = (document.text for document, _ in zip(read_documents(books, "held_out"), range(4), strict=False))
    model = ByteTrigramModel.fit(text[:300_000] for text in texts)
    prose = next(read_documents(validation, "held_out")).text[20_000:40_000]
    draw = random.Random(0)
    rated = [
        model.bits_per_byte(text)
        for text in (
            "the man said that he was in the house and that he had to go to the old man. " * 20,
            prose,
            "".join(draw.sample(prose, len(prose))),
            "".join(draw.choices("abcdefghijklmnopqrstuvwxyz0123456789+/=", k=5000)),
            "".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(2000)),
        )
    ]
    assert rated == sorted(rated) and min(np.diff(rated)) > 0.3


@pytest.mark.parametrize("settings", [{"sample_bytes": 0}, {"bucket_bytes": 0}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match="sample_bytes and bucket_bytes must be positive, got"):
        DifficultyConfig(**settings)
