"""SentencePiece models as tokenizer.json: the ids that transformers computes against SentencePiece's own."""

import inspect
import io
import json
import textwrap

import hypothesis
import hypothesis.strategies as st
import jax
import jinja2
import numpy as np
import pytest
import sentencepiece
import transformers

from lfm_jax.interop import (
    GenerationSettings,
    export_folder,
    read_tokenizer_json,
    sentencepiece_to_tokenizer,
    tokenizer_json,
    write_tokenizer,
)
from lfm_jax.interop.gguf_tokenizer import read_vocabulary
from lfm_jax.interop.tokenizer_json import CHAT_TEMPLATE
from lfm_jax.isolation.limits import LimitError
from lfm_jax.models import Decoder, ModelConfig, functional

SYMBOLS = [
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>", "<|im_end|>",
    "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>",
    "<|tool_response_end|>",
]  # fmt: skip
# Periodic text, runs and accents, so that there are pieces whose halves overlap.
OVERLAPS = ["aaaa aaaaaa bababab ababa", "        indented", "12 123 1234", "h\u00e9llo \u4f60\u597d\u4f60\u597d \U0001f600"]
CORPUS = "\n".join([inspect.getsource(module) for module in (inspect, io, json, textwrap)] + OVERLAPS * 30)


def _train(**changes):
    settings = {
        "model_type": "bpe", "vocab_size": 1500, "byte_fallback": True, "normalization_rule_name": "identity",
        "add_dummy_prefix": False, "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
        "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 14, "pad_piece": SYMBOLS[0], "bos_piece": SYMBOLS[1],
        "eos_piece": SYMBOLS[2], "control_symbols": SYMBOLS[3:], "num_threads": 1, "minloglevel": 2,
    }  # fmt: skip
    model = io.BytesIO()
    lines = iter(CORPUS.split("\n"))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **settings | changes)
    return model.getvalue()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("workdir") / "tokenizer" / "tokenizer.model"
    file.parent.mkdir()
    file.write_bytes(_train())
    return file


def _export(folder, tokenizer, **sizes):
    config = ModelConfig(**sizes, embed_dim=8, layer_types=("conv",), num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), functions.abstract_params)
    return export_folder(config, params, {}, folder, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def pair(model_file, tmp_path_factory):
    """(SentencePiece's processor, what AutoTokenizer makes of an exported model's folder)."""
    folder = _export(tmp_path_factory.mktemp("export") / "hf", model_file.parent, vocab_size=1536, tokenizer_vocab_size=1500)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_file.read_bytes())
    return processor, transformers.AutoTokenizer.from_pretrained(folder)


def _assert_same(pair, text):
    processor, theirs = pair
    ids = theirs.encode(text)
    assert ids == [1, *processor.encode(text)]
    assert theirs.encode(text, add_special_tokens=False) == processor.encode(text)
    # SentencePiece reads its own space mark as a space.
    assert theirs.decode(ids, skip_special_tokens=True) == text.replace("\u2581", " ")


DIFFICULT = [
    "", " ", "a", "  two  spaces ", "\t\ttabs\t", "line\r\nbreaks\n\n\r", "    def f(x):\n        return x[0]  # 12345\n",
    "1234567890 3.14159 0x7f 1e-9", "caf\u00e9 cafe\u0301 \ufb01 \u2460 \u00bd", "\u4f60\u597d\u3000\u4e16\u754c \u3053\u3093",
    "\u0645\u0631\u062d \u05e9\u05dc \u200f\u202e", "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "zero\u200bwidth\u00a0nbsp\ufeff", "\x00\x01\x7f", "<0x0A><unk> \u2581under", "\ufffd\uffff\U0010ffff", "a" * 999, " " * 333,
    "ab" * 100 + "a", "baaab aaaba " * 9,
]  # fmt: skip


@pytest.mark.parametrize("text", DIFFICULT, ids=range(len(DIFFICULT)))
def test_difficult_text(text, pair):
    _assert_same(pair, text)


def test_whole_source_files(pair):
    """A hundred thousand characters as one text: merges are ranked over all of it."""
    for module in (inspect, transformers.generation.utils):
        _assert_same(pair, inspect.getsource(module))


@hypothesis.given(st.text(max_size=60))
def test_any_text(pair, text):
    _assert_same(pair, text)


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.text(alphabet="ab aeinrst_=()\n1\u2581\u00e9\U0001f600", max_size=80))
def test_text_with_many_merges(pair, text):
    _assert_same(pair, text)


@hypothesis.given(st.lists(st.integers(15 + 256, 1499), max_size=30))
def test_any_pieces_decode_alike(pair, ids):
    """All but the byte pieces, which stand behind the unknown symbol."""
    processor, theirs = pair
    assert theirs.decode(ids) == processor.decode(ids)


def test_exactly_one_bos_everywhere(pair):
    _, theirs = pair
    assert theirs("text").input_ids.count(1) == 1
    assert [ids.count(1) for ids in theirs(["a", "b c"]).input_ids] == [1, 1]
    rendered = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=True)["input_ids"]
    assert rendered.count(1) == 1
    assert rendered[0] == 1


def test_special_symbols_have_their_ids(pair):
    _, theirs = pair
    assert theirs.convert_tokens_to_ids(SYMBOLS) == list(range(14))
    assert theirs.encode("".join(SYMBOLS), add_special_tokens=False) == list(range(14))
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|startoftext|>", "<|im_end|>", "<|pad|>")
    assert len(theirs) == 1500


TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CHATS = {
    "question": ([{"role": "user", "content": "Hi\n"}], None),
    "system": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], None),
    "tools": ([{"role": "user", "content": "Weather?"}], [TOOL, TOOL | {"x": "<&>"}]),
    "calls": (
        [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Weather in SF?"},
            {"role": "assistant", "content": '<|tool_call_start|>[get_weather(location="SF")]<|tool_call_end|>'},
            {"role": "tool", "content": {"degrees": 20}},
            {"role": "assistant", "content": "20 degrees."},
        ],
        [TOOL],
    ),
}


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("name", CHATS)
def test_chat_template_renders_as_the_published_one(name, prompt, pair, published_data):
    messages, tools = CHATS[name]
    published = (published_data / "lfm_templates" / "LFM2-8B-A1B.jinja").read_text()
    render = {"tools": tools, "tokenize": False, "add_generation_prompt": prompt}
    expected = pair[1].apply_chat_template(messages, chat_template=published, **render)
    assert pair[1].apply_chat_template(messages, **render) == expected


def test_chat_template_takes_tools_as_text(published_data):
    """Which transformers does not pass on, but others do."""
    published = (published_data / "lfm_templates" / "LFM2-8B-A1B.jinja").read_text()
    values = {"messages": CHATS["system"][0], "tools": ["plain", TOOL], "bos_token": "B"}
    ours, theirs = (jinja2.Template(template).render(values) for template in (CHAT_TEMPLATE, published))
    assert ours == theirs


def test_chat_template_by_hand(pair):
    messages, tools = CHATS["calls"]
    ids = pair[1].apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert [index for index in ids if index < 14] == [1, 6, 8, 9, 7, 6, 7, 6, 10, 11, 7, 6, 12, 13, 7, 6, 7]
    text = pair[1].apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True)
    assert text == "<|startoftext|><|im_start|>user\nWeather in SF?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 600}, "is no BPE model with identity normalization"),
        ({"add_dummy_prefix": True}, "is no BPE model with identity normalization"),
        ({"remove_extra_whitespaces": True}, "is no BPE model with identity normalization"),
        ({"normalization_rule_name": "nmt_nfkc"}, "is no BPE model with identity normalization"),
        ({"byte_fallback": False, "vocab_size": 1200}, "was trained without byte fallback"),
    ],
    ids=["unigram", "prefix", "whitespace", "nfkc", "bytes"],
)
def test_other_kinds_of_model_are_refused(changes, message, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(_train(**changes))
    with pytest.raises(ValueError, match=message):
        sentencepiece_to_tokenizer(tmp_path / "tokenizer.model", 1)


def test_a_bos_that_is_no_symbol_is_refused(model_file):
    with pytest.raises(ValueError, match="bos_id 600 is no control symbol of .*; those are"):
        sentencepiece_to_tokenizer(model_file, 600)


def test_a_tokenizer_json_is_copied_through(model_file, tmp_path):
    first, second, third = (tmp_path / name for name in "abc")
    for folder in (first, second, third):
        folder.mkdir()
    assert write_tokenizer(model_file, first, GenerationSettings()) == 1500
    (first / "chat_template.jinja").write_text("{{ messages }}")
    assert write_tokenizer(first, second, GenerationSettings()) == 1500
    assert write_tokenizer(second / "tokenizer.json", third, GenerationSettings()) == 1500
    for file in first.iterdir():
        assert (third / file.name).read_bytes() == file.read_bytes()


def test_a_bare_tokenizer_json_gets_its_settings(model_file, tmp_path):
    bare, folder = tmp_path / "bare.json", tmp_path / "out"
    folder.mkdir()
    bare.write_text(sentencepiece_to_tokenizer(model_file, 1).to_str())
    write_tokenizer(bare, folder, GenerationSettings(eos_ids=(2,)))
    assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_beside_a_sentencepiece_model_is_taken_along(place, model_file, tmp_path):
    source, folder, template = tmp_path / "source", tmp_path / "out", "{{ messages[0].content }} of our own"
    source.mkdir(), folder.mkdir()
    (source / "tokenizer.model").write_bytes(model_file.read_bytes())
    (source / place).write_text(template if place.endswith("jinja") else json.dumps({"chat_template": template}))
    write_tokenizer(source, folder, GenerationSettings())
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template([{"role": "user", "content": "Words"}], tokenize=False) == "Words of our own"
    assert read_vocabulary(source, GenerationSettings()).chat_template == template


def test_missing_tokenizers_are_named(model_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither tokenizer.model nor tokenizer.json"):
        write_tokenizer(tmp_path, tmp_path, GenerationSettings())
    with pytest.raises(FileNotFoundError, match="none.model is missing; expected a SentencePiece model"):
        write_tokenizer(tmp_path / "none.model", tmp_path, GenerationSettings())
    with pytest.raises(ValueError, match="eos_token is id 1500, which the tokenizer of 1500 ids does not have"):
        write_tokenizer(model_file, tmp_path, GenerationSettings(eos_ids=(1500,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {"vocab": [["a", 0.0]]}}', "tokenizer.json has no model.vocab that maps tokens to ids"),
        ('{"model": {"vocab": {"a": 0.5}}}', "tokenizer.json has the id 0.5; ids are whole numbers below 16777216"),
        ('{"model": {"vocab": {"a": 16777216}}}', "tokenizer.json has the id 16777216; ids"),
        ('{"model": {"vocab": {"a": -1}}}', "tokenizer.json has the id -1; ids"),
        ('{"model": {"vocab": {"a": [0]}}}', "has added_tokens or a vocab without ids and texts .TypeError"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', "added_tokens or a vocab without ids .* .KeyError"),
        ('{"model": {"vocab": {"a": 0, "b": 0}}}', "gives 1 of its ids to two tokens"),
        ('{"model": {"vocab": {"a": 0}}}', "tokenizer.json: cannot be used by tokenizers 0"),
        ("[" * 100_000, "tokenizer.json is no JSON: maximum recursion"),
        ("9" * 5000, "tokenizer.json is no JSON: Exceeds the limit"),
        ("[]", "tokenizer.json has no model.vocab"),
        ("{", "tokenizer.json is no JSON"),
    ],
)
def test_an_unreadable_tokenizer_json_is_refused(text, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        write_tokenizer(tmp_path, tmp_path / "out", GenerationSettings())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 1499}, "the tokenizer has 1500 ids, the model vocab_size 1499"),
        ({"vocab_size": 1600, "tokenizer_vocab_size": 1400}, "the tokenizer has 1500 ids, the model tokenizer_vocab_size 1400"),
    ],
)
def test_a_tokenizer_of_another_size_is_refused(sizes, message, model_file, tmp_path):
    with pytest.raises(ValueError, match=message):
        _export(tmp_path / "hf", model_file, **sizes)
    assert not (tmp_path / "hf").exists()


def _content(model_file, **changes):
    return json.dumps(json.loads(sentencepiece_to_tokenizer(model_file, 1).to_str()) | changes).encode()


def _sequence(length):
    replace = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10}
    return {"normalizer": {"type": "Sequence", "normalizers": [replace] * length}}


PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (_sequence(12), LimitError, "some/file: more than (2048 MiB of memory|8 seconds of processor time)"),
        ({"padding": {**PADDING, "strategy": {"Fixed": 1 << 31}}}, LimitError, "some/file: more than 2048 MiB of memory"),
        ({"padding": {**PADDING, "strategy": {"Fixed": 1 << 62}}}, ValueError, "some/file: PanicException"),
        (_sequence(2), ValueError, r"some/file: makes \d+ ids of \d+ bytes of text"),
    ],
    ids=["growth", "padding", "panic", "some_growth"],
)
def test_a_tokenizer_json_that_would_end_the_process_is_refused(changes, error, message, model_file):
    """Each of them aborts Python, or takes its memory, when it is loaded and used in this process."""
    with pytest.raises(error, match=message):
        read_tokenizer_json(_content(model_file, **changes), "some/file")


def test_ids_that_tokenizers_reads_otherwise_are_noticed(model_file):
    """The package numbers added tokens itself, whatever the file says."""
    content = json.loads(_content(model_file))
    added = content["added_tokens"] + [content["added_tokens"][-1] | {"content": "<|new|>", "id": 1700}]
    with pytest.raises(ValueError, match="some/file has ids below 1701, but tokenizers reads it as having ids below 1501"):
        read_tokenizer_json(_content(model_file, added_tokens=added), "some/file")


def test_a_tokenizer_json_is_looked_at_once(model_file, monkeypatch):
    data = _content(model_file) + b" "  # which no other test has
    assert read_tokenizer_json(data, "some/file") == 1500
    monkeypatch.setattr(tokenizer_json, "call_limited", None)
    assert read_tokenizer_json(data, "other/name") == 1500


def test_a_file_too_long_for_a_tokenizer_is_not_parsed(monkeypatch):
    monkeypatch.setattr(tokenizer_json, "_MOST_BYTES", 10)
    with pytest.raises(ValueError, match="some/file has 11 bytes, more than 10: that is no tokenizer"):
        read_tokenizer_json(b"[0,0,0,0,0]", "some/file")


def test_settings_that_ask_for_code_are_refused(model_file, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "tokenizer.json").write_bytes(_content(model_file))
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    with pytest.raises(ValueError, match="tokenizer_config.json has auto_map, which asks readers to run code"):
        write_tokenizer(source, out, GenerationSettings())
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is no JSON"):
        write_tokenizer(source, out, GenerationSettings())


def test_bytes_that_are_no_sentencepiece_model_are_refused(tmp_path):
    for content in (b"\x0a\x03abc", _train().replace(b"<0x06>", b"\xbc0x06>", 1)):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.model is no SentencePiece model"):
            sentencepiece_to_tokenizer(tmp_path / "tokenizer.model", 1)


def test_a_piece_that_is_no_utf8_is_named(tmp_path):
    content = _train()
    start = content.index("\u4f60\u597d".encode())
    (tmp_path / "tokenizer.model").write_bytes(content[:start] + b"\xff" + content[start + 1 :])
    with pytest.raises(ValueError, match=r"tokenizer.model is damaged: piece \d+ is no UTF-8 .invalid start byte"):
        sentencepiece_to_tokenizer(tmp_path / "tokenizer.model", 1)
