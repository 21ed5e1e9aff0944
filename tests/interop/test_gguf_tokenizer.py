"""Tokenizers in GGUF files: the ids of llama.cpp against those of our own tokenizers, on text that is hard to split."""

import functools
import inspect
import io
import json
import random
import tempfile
import textwrap
import unicodedata
from pathlib import Path

import jax
import jinja2
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipelines import Document, TokenizerConfig, load_tokenizer, train_tokenizer
from data_pipelines.tokenization.tokenizer import SYMBOLS
from experiments.llama_cpp import run_llama_cpp
from lfm_jax.interop import GenerationSettings, gguf_tokenizer, sentencepiece_to_tokenizer, write_tokenizer
from lfm_jax.interop.gguf_file import export_gguf
from lfm_jax.interop.gguf_tokenizer import read_vocabulary
from lfm_jax.interop.tokenizer_json import CHAT_TEMPLATE
from lfm_jax.models import Decoder, ModelConfig, functional

# Periodic text, runs and accents besides, so that there are pieces whose halves overlap.
OVERLAPS = ["aaaa aaaaaa bababab ababa", "        indented", "12 123 1234", "h\u00e9llo \u4f60\u597d\u4f60\u597d \U0001f600"]
CORPUS = "\n".join([inspect.getsource(module) for module in (inspect, io, json, textwrap)] + OVERLAPS * 30)
LFM2, QWEN2 = gguf_tokenizer._LFM2, gguf_tokenizer._QWEN2
HARD = [
    "", " ", "a", " leading", "trailing ", "  two  spaces ", " " * 40, "\t \t", "aaaa aaaaaa bababab ababa",
    "12345 1 22 333 4444 \u0663\u0664\u0665\u0666 \u00bd \u2167 \u00b2\u00b3 \u0967\u0968\u0969 \uff11\uff12\uff13\uff14 \u2460",
    "it's IT'S we'Re don\u2019t I'LL'd 'tis", "caf\u00e9 cafe\u0301 na\u00efve \u00c5 A\u030a \u01c6 \ufb01 e\u0301\u0302\u0303",
    "\r\n\r\n a\r\nb\rc\n\n\n  d\t\te \n", "def f(x):\n    return x[0]\n\n\n# ---- !!! ???\n", "http://x.y/z?a=1&b=%20",
    "\U0001f469\u200d\U0001f4bb\U0001f468\u200d\U0001f469 \U0001f1eb\U0001f1f7 \U0001f3f3\ufe0f\u200d\U0001f308 x\U0001f600y",
    "<|im_start|>user\n<|im_end|>", "<|im_end|", "<| im_end |>", "<|im_end|>\n<0x0A><unk></s>",
    "<|startoftext|>", "\uff1c|im_end|\uff1e <\uff5cim_end\uff5c>", "\u4f60\u597d\u3000\u4e16\u754c\uff0c\u3002\u300c\u300d",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u09ac\u09be\u0982\u09b2\u09be \u0e44\u0e17 \u0627\u0644 \u05e2",
    "\u00a0\u2003\u2028\u2029\u0085\u200b\ufeff\u00ad\v\f x", "\x01\x02\x7f a\0b", "ABC\u00c0\u00c9 \u0391\u0392 \u0416\u0417",
    "\U0001d518\U0001d52b\U0001d526 \U00010348 \U0010ffff \ufffd \uffff", "_foo_bar__ -- \u2014 \u2026",
    "\u0130i \u0131I \u00df SS",
]  # fmt: skip


def _page():
    """The hard texts, 300 shuffles of their characters, and 300 runs of characters from everywhere; each seed the same."""
    draws = random.Random(0)
    characters = "".join(HARD)
    everywhere = [chr(code) for code in range(1, 0x20000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    texts = [*HARD, *("".join(draws.choices(pool, k=draws.randrange(1, 40))) for pool in [characters, everywhere] * 300)]
    # SentencePiece's mark of a space is in neither kind of file a character of its own.
    return [text.replace("\u2581", "") for text in texts]


def _train(folder):
    """A SentencePiece model of 900 pieces."""
    train_tokenizer(TokenizerConfig(vocab_size=900), [Document(CORPUS, "corpus")], folder)
    return folder / "tokenizer.model"


def _byte_level(split, *, ignore_merges=False, stray=None):
    """A byte-level BPE that is trained here. stray: a token to which no merges lead."""
    byte_level = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if split == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])
    elif split:
        parts = [pre_tokenizers.Split(Regex(split), "isolated"), byte_level(use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    else:
        tokenizer.pre_tokenizer = byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=list(SYMBOLS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.split("\n"), trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    if stray:
        vocab[stray] = len(vocab)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"].append({"id": len(vocab), "content": "<think>", **flags})
    return content


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("sentencepiece") / "trained")


@functools.cache
def _weights(always=0):
    """A model that says one id, whatever it is told: its blocks add nothing to an embedding that is the same for all."""
    config = ModelConfig(
        vocab_size=1024, embed_dim=8, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8,
        tie_embeddings=False,
    )  # fmt: skip
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    trees = (functions.abstract_params, functions.abstract_buffers)
    params, buffers = (jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree) for tree in trees)
    params["embed"]["embedding"] += 1
    params["final_norm"]["scale"] += 1
    params["lm_head"][:, always] += 1
    return config, params, buffers


def _export(source, path, generation=None, always=0):
    return export_gguf(*_weights(always), path, tokenizer=source, type="F32", generation=generation)


def _save(content, folder):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


KINDS = {
    "lfm2": (LFM2, {}, "lfm2"),
    "words_as_they_are": (LFM2, {"ignore_merges": True, "stray": "dictionaries"}, "lfm2"),
    "merges_alone": (LFM2, {"stray": "dictionaries"}, "smaug-bpe"),
    "qwen2": (QWEN2, {"ignore_merges": True}, "qwen2"),
    "gpt2": (None, {}, "gpt-2"),
    "digits": ("digits", {}, "smollm"),
}


def _check_in_llama_cpp(source, folder):
    """The same ids; every symbol one id, where it is meant as one, and no id where it is text; one beginning of a chat."""
    own = load_tokenizer(source)
    file = _export(source, folder / "model.gguf")
    page = [*_page(), "dictionaries and <think>thoughts", *SYMBOLS]
    chat = [{"role": "user", "content": "hi"}]
    answers = run_llama_cpp(file, texts=page, chats=[chat])
    expected = own.encode_batch(page)
    assert [(text, ids) for text, ids in zip(page, answers.ids, strict=True)] == list(zip(page, expected, strict=True))
    special = [own.symbol_id(symbol) for symbol in SYMBOLS]
    assert special == list(range(len(SYMBOLS)))
    assert not set(special) & {index for ids in answers.ids for index in ids}
    assert run_llama_cpp(file, texts=SYMBOLS, symbols=True).ids == [[index] for index in special]
    turn, newline, answer = (own.encode(text) for text in ("user\nhi", "\n", "assistant\n"))
    assert answers.chat_ids == [[own.bos_id, 6, *turn, 7, *newline, 6, *answer]]


@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_ids_are_those_of_llama_cpp(kind, tmp_path):
    split, options, pre = KINDS[kind]
    source = _save(_byte_level(split, **options), tmp_path)
    assert read_vocabulary(source, GenerationSettings()).pre == pre
    _check_in_llama_cpp(source, tmp_path)


def test_sentencepiece_ids_are_those_of_llama_cpp(sentencepiece_model, tmp_path):
    _check_in_llama_cpp(sentencepiece_model, tmp_path)


def test_the_mark_of_a_space_becomes_a_space(sentencepiece_model, tmp_path):
    """The one character that differs: our tokenizer spells it in bytes, llama.cpp (like transformers) takes it for a space."""
    own = load_tokenizer(sentencepiece_model)
    (ids,) = run_llama_cpp(_export(sentencepiece_model, tmp_path / "model.gguf"), texts=["a\u2581b"]).ids
    assert ids == own.encode("a b") != own.encode("a\u2581b")


def test_a_converted_tokenizer_is_the_same_as_its_source(sentencepiece_model, tmp_path):
    """What an exported folder holds becomes what the SentencePiece model becomes."""
    write_tokenizer(sentencepiece_model, tmp_path, GenerationSettings())
    assert read_vocabulary(tmp_path, GenerationSettings()) == read_vocabulary(sentencepiece_model, GenerationSettings())


def test_types_and_special_ids(sentencepiece_model):
    vocabulary = read_vocabulary(sentencepiece_model, GenerationSettings(eos_ids=(7, 2, 5)))
    assert (vocabulary.model, vocabulary.pre, vocabulary.suppressed) == ("llama", "default", [])
    assert vocabulary.types[:16] == [3] * 14 + [2, 6]
    assert vocabulary.types.count(6) == 256
    assert vocabulary.special == {
        "bos": 1, "padding": 0, "eos": 7, "eot": 2, "eom": 5, "fim_pre": 3, "fim_mid": 4, "fim_suf": 5, "unknown": 14
    }  # fmt: skip
    assert "<|im_start|>" in vocabulary.chat_template


@pytest.mark.parametrize("eos_ids", [(7, 2), (300, 301, 302)], ids=["chat", "others"])
def test_every_end_ends_a_generation(eos_ids, sentencepiece_model, tmp_path):
    generation = GenerationSettings(eos_ids=eos_ids)
    for index, length in [(index, 1) for index in eos_ids] + [(400, 5)]:
        file = _export(sentencepiece_model, tmp_path / "model.gguf", generation, always=index)
        assert run_llama_cpp(file, prompts=[[1, 20]], new_tokens=5).continuations == [[index] * length]


def test_ids_without_a_token_are_never_sampled(tmp_path):
    """They have a text all the same, as llama.cpp wants one for each id, and would win every time."""
    content = _byte_level(LFM2)
    last = next(token for token, index in content["model"]["vocab"].items() if index == 899)
    content["model"]["vocab"][last] = 950
    source = _save(content, tmp_path)
    vocabulary = read_vocabulary(source, GenerationSettings())
    assert vocabulary.suppressed == [899, *range(901, 950)]
    file = _export(source, tmp_path / "model.gguf", always=899)
    answers = run_llama_cpp(file, prompts=[[1, 20]], followed=[[1, 20]], new_tokens=5)
    assert np.argmax(answers.next_log_probs[0]) == 899
    assert not set(answers.continuations[0]) & set(vocabulary.suppressed)


def test_a_template_beside_the_tokenizer_is_taken_along(tmp_path):
    source = _save(_byte_level(LFM2), tmp_path)
    assert read_vocabulary(source, GenerationSettings()).chat_template == CHAT_TEMPLATE
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    for settings, expected in (
        ({"chat_template": "{{ messages[0].content }}?"}, "hi?"), ({"chat_template": named}, "hi!"), ({}, True),
    ):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        template = read_vocabulary(source, GenerationSettings()).chat_template
        rendered = template == CHAT_TEMPLATE or jinja2.Template(template).render(messages=[{"content": "hi"}])
        assert rendered == expected
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    own = load_tokenizer(source)
    file = _export(source, tmp_path / "model.gguf")
    assert run_llama_cpp(file, chats=[[{"role": "user", "content": "hi"}]]).chat_ids == [[own.bos_id, *own.encode("hi")]]


@functools.cache
def _texts(kind):
    """A tokenizer.json that is sound."""
    if kind == "bytes":
        return json.dumps(_byte_level(LFM2))
    with tempfile.TemporaryDirectory() as folder:
        return sentencepiece_to_tokenizer(_train(Path(folder) / "trained"), 1).to_str()


def _model(**changes):
    return lambda content: content["model"].update(changes)


def _top(**changes):
    return lambda content: content.update(changes)


def _add(text, **flags):
    """Another token behind all others, in the vocabulary too, so that its id is the one that is written."""

    def change(content):
        size = len(content["model"]["vocab"]) + (content["added_tokens"][-1]["content"] == "<think>")
        entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        content["added_tokens"].append({"id": size, "content": text, **entry, **flags})

    return change


def _pieces(*texts):
    """More pieces, to which no merges lead."""

    def change(content):
        vocab = content["model"]["vocab"]
        vocab.update({text: len(vocab) + place for place, text in enumerate(texts)})

    return change


def _part_merges(content):
    """Of the two ways to make a piece, one comes last of all."""
    merges = content["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    second = next(place for place in range(1, len(made)) if made[place] == made[place - 1])
    merges.append(merges.pop(second))


def _raise_highest(content):
    """The last token of the vocabulary far behind all others, so that the number of ids stays what it is."""
    vocab = content["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = 950


def _both(*changes):
    return lambda content: [change(content) for change in changes]


def _think(**changes):
    return lambda content: content["added_tokens"][-1].update(changes)


def _drop(key):
    """A byte gone, and its id given to a token that nothing needs."""

    def change(content):
        vocab = content["model"]["vocab"]
        vocab["\u2603"] = vocab.pop(key)

    return change


_SPLIT = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_KNOWN, _QWEN2 = ({**_SPLIT, "pattern": {"Regex": expression}} for expression in (LFM2, QWEN2))


def _sequence(*parts):
    return _top(pre_tokenizer={"type": "Sequence", "pretokenizers": list(parts)})


UNKNOWN_RULE = "splits text by a rule that is none of those known to be the same in llama.cpp"
REFUSED = {
    "dropout": ("bytes", _model(dropout=0.1), "is no BPE without dropout, prefixes and suffixes"),
    "suffix": ("bytes", _model(end_of_word_suffix="</w>"), "is no BPE without dropout, prefixes and suffixes"),
    "strips": ("bytes", _add("<a>", rstrip=True), "'<a>' takes spaces around it or stands alone"),
    "alone": ("bytes", _add("<a>", single_word=True), "'<a>' takes spaces around it or stands alone"),
    "two_texts": ("bytes", _both(_raise_highest, _add("<a>", id=800)), "gives id 800 to .* and to '<a>'"),
    "nul": ("bytes", _add("a\0b"), r"token 901 is 'a\\x00b'; llama.cpp reads it as another one"),
    "normalizer": ("bytes", _top(normalizer={"type": "NFC"}), "changes text before it splits it .*NFC"),
    "byte_missing": ("bytes", _drop("\u00c0"), "lacks 1 of the 256 bytes, which llama.cpp would leave out"),
    "expression": ("bytes", _sequence(_SPLIT, _BYTES), UNKNOWN_RULE),
    "removed": ("bytes", _sequence({**_KNOWN, "behavior": "Removed"}, _BYTES), UNKNOWN_RULE),
    "inverted": ("bytes", _sequence({**_KNOWN, "invert": True}, _BYTES), UNKNOWN_RULE),
    "two_splits": ("bytes", _sequence(_KNOWN, _KNOWN, _BYTES), UNKNOWN_RULE),
    "split_twice": ("bytes", _sequence(_KNOWN, {**_BYTES, "use_regex": True}), UNKNOWN_RULE),
    "prefix": ("bytes", _top(pre_tokenizer={**_BYTES, "use_regex": True, "add_prefix_space": True}), UNKNOWN_RULE),
    "unsplit": ("bytes", _top(pre_tokenizer=_BYTES), UNKNOWN_RULE),
    "no_split": ("bytes", _top(pre_tokenizer=None), UNKNOWN_RULE),
    "string": ("bytes", _sequence({**_SPLIT, "pattern": {"String": " "}}, _BYTES), UNKNOWN_RULE),
    "stray": (
        "bytes", _both(_pieces("zzzz"), _think(id=901), _model(ignore_merges=True), _sequence(_QWEN2, _BYTES)),
        "takes words that are tokens as they are, also 'zzzz', to which no merges lead",
    ),
    "moved": ("bytes", _both(_raise_highest, _think(id=905)), "has '<think>' as id 905, but tokenizers reads it as 900"),
    "prepends": ("pieces", _top(normalizer={"type": "Prepend", "prepend": "\u2581"}), "does more to a text than to write spaces"),
    "splits": ("pieces", _top(pre_tokenizer=_KNOWN), "does more to a text than to write spaces as"),
    "words": ("pieces", _model(ignore_merges=True), "does more to a text than to write spaces as"),
    "no_byte": ("pieces", _drop("<0x0A>"), "lacks some of the 256"),
    "order": ("pieces", _part_merges, "joins some pieces before others that make the same piece"),
    "joins": ("pieces", _pieces("<|im_end|"), "has the pieces '<|im_end|' and '>', of which llama.cpp would make"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_read_otherwise_is_refused(case, tmp_path):
    kind, change, message = REFUSED[case]
    content = json.loads(_texts(kind))
    change(content)
    source = _save(content, tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        read_vocabulary(source, GenerationSettings())
    assert str(source) in str(raised.value)


def test_two_tokens_with_one_text_are_refused(tmp_path):
    """llama.cpp refuses such a file, and some versions end their process."""
    content = json.loads(_texts("bytes"))
    vocab = content["model"]["vocab"]
    _both(_raise_highest, _add(next(token for token, index in vocab.items() if index == 500), id=901))(content)
    with pytest.raises(ValueError, match="has the token .* twice, as 500 and 901"):
        read_vocabulary(_save(content, tmp_path), GenerationSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_ids": (2, 3, 4, 5)}, "eos_ids has 4 ids; llama.cpp has keys for 3"),
        ({"eos_ids": (7, 901)}, "eot is id 901, which .* does not have; its ids are below 901"),
        ({"bos_id": -1}, "bos is id -1, which .* does not have"),
    ],
)
def test_special_ids_that_are_not_there_are_refused(settings, message, tmp_path):
    source = _save(json.loads(_texts("bytes")), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        read_vocabulary(source, GenerationSettings(**settings))
