"""Tokenizers: text comes back as it was, from SentencePiece and from tokenizer.json."""

import inspect
import io
import json
import pathlib
import pickle
import textwrap

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece

from data_pipelines import Document, TokenizerConfig, load_tokenizer, train_tokenizer
from data_pipelines.tokenization.tokenizer import SYMBOLS, _parts, _sample
from lfm_jax.interop import sentencepiece_to_tokenizer

SOURCES = [inspect.getsource(module) for module in (inspect, io, json, textwrap, pathlib)]
DOCUMENTS = [Document(text, f"{index}.py") for index, text in enumerate(SOURCES)]
VOCAB_SIZE = 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workdir") / "tokenizer"
    train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE), DOCUMENTS, folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    """The same tokenizer as a tokenizer.json."""
    file = tmp_path_factory.mktemp("converted") / "tokenizer.json"
    file.write_text(sentencepiece_to_tokenizer(folder / "tokenizer.model", 1).to_str())
    return load_tokenizer(file.parent)


DIFFICULT = [
    "", " ", "  two  spaces ", "\t\ttabs\t", "line\r\nbreaks\n\n\r", "    def f(x):\n        return x[0]  # 12345\n",
    "caf\u00e9 cafe\u0301 \ufb01 \u2460", "\u4f60\u597d\u3000\u4e16\u754c", "\U0001f469\u200d\U0001f467",
    "\ufeffzero\u200bwidth\u00a0",
    "\x00\x01\x7f", "<0x0A><unk>", "\ufffd\uffff\U0010ffff", "\u2581", " \u2581 \u2581\u2581a\u2581", "\u2047 \u2585", "a" * 999,
    "\u2028\u0085\v\f", "".join(SYMBOLS), SOURCES[0],
]  # fmt: skip


@pytest.mark.parametrize("text", DIFFICULT, ids=range(len(DIFFICULT)))
def test_difficult_text_comes_back(text, trained):
    assert trained.decode(trained.encode(text)) == text


@hypothesis.given(st.text(max_size=80))
def test_any_text_comes_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.text(alphabet="ab aeinrst_=():\n\t1\u2581\u00e9\U0001f600", max_size=80))
def test_text_of_many_merges_comes_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.text(alphabet="ab aeinrst_=():\n\t1\u00e9\U0001f600", max_size=80))
def test_both_kinds_of_file_give_the_same_ids(trained, converted, text):
    assert converted.encode(text) == trained.encode(text)
    assert converted.decode(converted.encode(text)) == text


def test_both_kinds_of_file_give_the_same_ids_for_whole_sources(trained, converted):
    assert converted.encode_batch(SOURCES) == trained.encode_batch(SOURCES)


def test_special_symbols_have_the_ids_of_lfm2(trained, converted, folder):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert [processor.id_to_piece(index) for index in range(14)] == list(SYMBOLS)
    assert all(processor.is_control(index) for index in range(14))
    assert processor.unk_id() == 14
    for tokenizer in (trained, converted):
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
        assert tokenizer.vocab_size == VOCAB_SIZE


def test_exactly_one_bos_everywhere(trained, converted):
    """Text has none of its own, not even when it spells one: the one that packing puts there is the only one."""
    for tokenizer in (trained, converted):
        for text in ("text", "<|startoftext|>text<|endoftext|>", "<|im_start|>user\n<|pad|>"):
            ids = tokenizer.encode(text)
            assert min(ids) > 14
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([1, *ids, 7, 2, 0]) == text  # special symbols have no text


def test_lines_and_indentation_are_pieces(trained):
    """A break of line joins what stands before it, and a run of spaces is one piece."""
    assert len(trained.encode("):\n")) == 1
    assert len(trained.encode("        ")) == 1
    # "\n", seven of the eight spaces, " return"
    assert len(trained.encode("\n        return")) == 3


def test_pieces_do_not_reach_across_words(folder):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(index) for index in range(VOCAB_SIZE)]
    assert not [piece for piece in pieces if "\u2581" in piece.lstrip("\u2581")]


def test_batches_are_encoded_as_their_texts_are(trained, converted):
    texts = ["one", "", "two \u2581 three", *SOURCES[:2]]
    for tokenizer in (trained, converted):
        expected = [tokenizer.encode(text) for text in texts]
        for threads in (None, 1, 3):
            assert tokenizer.encode_batch(texts, threads) == expected


def test_a_copy_sent_to_another_process_gives_the_same_ids(trained, converted):
    """Symbols that a text spells are text there, too."""
    text = "said <|im_end|> and <|endoftext|>"
    for tokenizer in (trained, converted):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode(text) == tokenizer.encode(text) and copy.fingerprint == tokenizer.fingerprint
        assert not set(copy.encode(text)) & set(range(len(SYMBOLS)))


def test_training_is_deterministic(folder, trained, tmp_path):
    again = train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE), iter(DOCUMENTS), tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert again.fingerprint == trained.fingerprint
    assert not [path for path in tmp_path.iterdir() if path.name != "again"]
    other = train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE + 1), DOCUMENTS, tmp_path / "other")
    assert other.fingerprint != trained.fingerprint


def test_of_much_text_a_sample_is_trained_on(tmp_path):
    """Of each of ten documents something, of all a fifth."""
    words = "abcdefghij"
    documents = [Document(f"{letter}{letter} " * 20_000, letter) for letter in words]
    samples = [_sample(documents, 120_000, seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    for sample in samples:
        assert 100_000 < len("".join(sample)) <= 120_000
        letters = [part.strip()[0] for part in sample]
        assert letters == sorted(letters)  # in the documents' order
        assert set(letters) == set(words)
    config = TokenizerConfig(vocab_size=282, train_bytes=120_000)
    tokenizer = train_tokenizer(config, documents, tmp_path / "t")
    assert all(len(tokenizer.encode(letter)) == 1 for letter in words)


@hypothesis.given(st.text(alphabet="a\n", max_size=200), st.integers(1, 9))
def test_the_parts_of_a_text_are_all_of_it(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipelines.tokenization.tokenizer._CHUNK_CHARACTERS", size)
        parts = list(_parts(text))
    assert "".join(parts) == text
    assert all(size <= len(part) <= 2 * size for part in parts[:-1])
    assert all(part.endswith("\n") or len(part) == 2 * size for part in parts[:-1])


def test_too_little_text_says_what_to_change(tmp_path):
    with pytest.raises(
        ValueError, match=r"too small for 4096 ids: it has pieces for \d+; lower the tokenizer's vocab_size, or give"
    ):
        train_tokenizer(TokenizerConfig(), [Document("ab " * 100, "a")], tmp_path / "t")
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        train_tokenizer(TokenizerConfig(), [], tmp_path / "t")
    characters = "".join(chr(0x4E00 + index) for index in range(100))
    with pytest.raises(
        ValueError, match=r"too many different characters for 300 ids: they need \d+; raise the tokenizer's vocab_size"
    ):
        train_tokenizer(TokenizerConfig(vocab_size=300), [Document(characters, "a")], tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_is_not_overwritten(folder, tmp_path):
    with pytest.raises(FileExistsError, match="exists; load the tokenizer from it, or delete it"):
        train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE), DOCUMENTS, folder)
    (tmp_path / ".t.part").mkdir()  # what an interrupted run leaves
    train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE), DOCUMENTS, tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("vocab_size", [271, 1 << 25])
def test_an_impossible_vocabulary_is_refused(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size must be more than 271 .* got {vocab_size}"):
        TokenizerConfig(vocab_size=vocab_size)
    with pytest.raises(ValueError, match="train_bytes must be positive, got 0"):
        TokenizerConfig(train_bytes=0)


def test_files_are_found(folder, tmp_path, trained):
    assert load_tokenizer(folder / "tokenizer.model").fingerprint == trained.fingerprint
    for path in (tmp_path, tmp_path / "none.model"):
        with pytest.raises(FileNotFoundError, match="holds no tokenizer; expected tokenizer.model or tokenizer.json"):
            load_tokenizer(path)


def test_a_foreign_sentencepiece_model_is_refused(folder, tmp_path):
    damaged = (folder / "tokenizer.model").read_bytes().replace(b"<0x06>", b"\xbc0x06>", 1)
    for content in (b"\x0a\x03abc", damaged):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.model is no SentencePiece model"):
            load_tokenizer(tmp_path)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES[0].splitlines()), model_writer=model, vocab_size=500, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(
        ValueError, match="tokenizer.model has no id for pad; expected symbols for the beginning and the end of a text"
    ):
        load_tokenizer(tmp_path)


def _json(**changes):
    vocab = {token: index for index, token in enumerate([*SYMBOLS[:3], "a", "b"])}
    added = [
        {
            "id": 0,
            "content": SYMBOLS[0],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    return {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer.json is no JSON"),
        (json.dumps({"model": {}}), "tokenizer.json has no model.vocab that maps tokens to ids"),
        (json.dumps(_json(model={"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, added_tokens=[])),
         r"has no id for <\|startoftext\|>, <\|endoftext\|>, <\|pad\|>"),
        (json.dumps(_json(model={"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []})), "gives 1 of its ids to two tokens"),
        (json.dumps(_json(model={"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []})), "the id 4294967295; ids are whole"),
        (json.dumps(_json(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]})), "cannot be used by tokenizers 0"),
    ],
)  # fmt: skip
def test_a_bad_tokenizer_json_is_refused(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_neither_cuts_nor_pads(tmp_path):
    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    cutting = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content = _json(padding={**padding, "pad_token": SYMBOLS[0]}, truncation=cutting)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("abba") == [3, 4, 4, 3]
    assert tokenizer.vocab_size == 5


def test_a_sentencepiece_model_with_a_piece_that_is_no_utf8_is_refused(folder, tmp_path):
    """It loads, and without the check fails when it comes to decode."""
    content = (folder / "tokenizer.model").read_bytes()
    start = content.index("\u2581=".encode())
    (tmp_path / "tokenizer.model").write_bytes(content[:start] + b"\xff" + content[start + 1 :])
    with pytest.raises(ValueError, match=r"tokenizer.model is damaged: piece \d+ is no UTF-8"):
        load_tokenizer(tmp_path)
