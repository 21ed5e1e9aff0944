"""Conversations as ids: transformers' own, one beginning, and every answer with its first token and the one that ends it."""

import pickle
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipelines import Document, Quarantine, TokenizerConfig, load_tokenizer, train_tokenizer
from data_pipelines.conversations import (
    CHAT_FORMATS,
    Conversation,
    ConversationEncoder,
    Examples,
    JinjaTemplate,
    encode_conversations,
)
from data_pipelines.tokenization.tokenizer import SYMBOLS
from lfm_jax.interop import sentencepiece_to_tokenizer

BOS, END = SYMBOLS.index("<|startoftext|>"), SYMBOLS.index("<|im_end|>")
# The pre-tokenizer of LFM2's tokenizer.json.
LFM2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "assistant\nHello there, user\n\n\nuser\nsystem\nBe brief.\n\nList of tools: []\n  assistant\n\n\n1234567 a\n\nb\n" * 20,
    "def f(x):\n    return x[0]\n\n\nassistant\nYes, the assistant\nreturns it.\nassistant\nThe\nassistant\n the\n" * 20,
]
FORMAT = CHAT_FORMATS["lfm2"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """(ours, transformers') of a tokenizer.json like LFM2's, small."""
    theirs = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(LFM2_WORDS), "isolated")
    theirs.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, False, False)])
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SYMBOLS), initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(CORPUS, trainer)
    return _pair(theirs, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """The same of a SentencePiece model that is trained here."""
    folder = tmp_path_factory.mktemp("pieces") / "tokenizer"
    ours = train_tokenizer(TokenizerConfig(vocab_size=330), [Document(text, "") for text in CORPUS], folder)
    return ours, _pair(sentencepiece_to_tokenizer(folder / "tokenizer.model", BOS), folder)[1]


def _pair(theirs, folder):
    theirs.save(str(folder / "tokenizer.json"))
    special = {"bos_token": SYMBOLS[1], "eos_token": "<|im_end|>", "pad_token": SYMBOLS[0]}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, clean_up_tokenization_spaces=False, **special)
    return load_tokenizer(folder / "tokenizer.json"), fast


texts = st.one_of(
    st.sampled_from(["", "Hello there", " the", "\n\n\nuser\n", "  \n x", "caf\u00e9 \u4f60\U0001f976", "1234567 a\n\nb"]),
    st.text("ab \n\tassitn1", max_size=10),
)
roles = ["user", "assistant", "tool"]
messages = st.fixed_dictionaries({"role": st.sampled_from(roles), "content": texts})
chats = st.builds(
    lambda many, answer: [*many, {"role": "assistant", "content": answer}], st.lists(messages, min_size=1, max_size=4), texts
)


def _theirs(theirs, template, messages, prompt=False):
    return theirs.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=prompt, return_dict=True
    )["input_ids"]


@pytest.fixture(scope="module")
def published(published_data):
    return (published_data / "lfm_templates" / "LFM2-8B-A1B.jinja").read_text()


@pytest.mark.parametrize("kind", ["byte_level", "pieces"])
@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(messages=chats)
def test_ids_are_those_of_transformers(kind, published, request, messages):
    """Of a prompt, and then of each answer, encoded as a model's words are: beginning with a token of their own."""
    ours, theirs = request.getfixturevalue(kind)
    ((ids, trained),) = ConversationEncoder(ours, FORMAT).examples([Conversation(messages)])[0]
    at = len(messages) - 1
    prompt = _theirs(theirs, published, messages[:at], True)
    answer = [*theirs.encode(messages[at]["content"], add_special_tokens=False), END]
    if not any(message["role"] == "assistant" for message in messages[:at]):
        assert ids.tolist() == prompt + answer
        assert trained.tolist() == [False] * len(prompt) + [True] * len(answer)
    assert ids[len(ids) - len(answer) :].tolist() == answer
    assert (ids == BOS).tolist() == [True] + [False] * (len(ids) - 1)


@hypothesis.given(messages=chats)
def test_ids_of_whole_texts_are_those_of_transformers(byte_level, published, messages):
    """LFM2's tokenizer joins nothing across the end of a line but blank lines that an answer may begin with."""
    messages = [{**message, "content": message["content"].lstrip()} for message in messages]
    ours, theirs = byte_level
    ((ids, _),) = ConversationEncoder(ours, FORMAT).examples([Conversation(messages)])[0]
    whole = _theirs(theirs, published, messages)
    assert ids.tolist() == whole[: len(ids)]
    assert theirs.decode(whole[len(ids) :]) == "\n"  # behind the last answer


CHAT = Conversation(
    [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "\nHello"}, {"role": "user", "content": "And?"},
        {"role": "assistant", "content": ""}, {"role": "user", "content": "?"},
    ]
)  # fmt: skip


def test_what_is_trained_by_hand(byte_level):
    """The first token of an answer and the one that ends it; also where an answer is empty, and nothing else."""
    ours, _ = byte_level
    ((ids, trained),) = ConversationEncoder(ours, FORMAT).examples([CHAT])[0]
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained.astype(int))) + 1)
    said = [ids[run].tolist() for run in runs if trained[run[0]]]
    assert said == [[*ours.encode("\nHello"), END], [END]]
    given = [ours.decode(ids[run].tolist()) for run in runs if not trained[run[0]]]
    assert given == ["system\nBe brief.\nuser\nHi\nassistant\n", "\nuser\nAnd?\nassistant\n"]
    assert len(ids) == sum(map(len, runs))


def test_a_prompt_is_what_stands_before_its_answer(pieces, byte_level):
    for ours in (pieces[0], byte_level[0]):
        encoder = ConversationEncoder(ours, CHAT_FORMATS["lfm2_5"])
        ((ids, trained),) = encoder.examples([CHAT])[0]
        first = [int(at) for at in np.flatnonzero(np.diff(trained.astype(int)) > 0) + 1]
        prompts = encoder.prompts([CHAT._replace(messages=CHAT.messages[:2]), CHAT._replace(messages=CHAT.messages[:4])])
        assert [prompt.tolist() for prompt in prompts] == [ids[:at].tolist() for at in first]


def test_symbols_that_messages_spell_are_text(pieces):
    ours, _ = pieces
    for spelled in SYMBOLS:
        chat = Conversation([{"role": role, "content": spelled} for role in ("system", "user", "tool", "assistant")], [spelled])
        ((ids, trained),) = ConversationEncoder(ours, FORMAT).examples([chat])[0]
        assert ids[ids < len(SYMBOLS)].tolist() == [BOS, 6, 8, 9, END, 6, END, 6, 12, 13, END, 6, END]
        assert ids[trained].tolist() == [*ours.encode(spelled), END]


def test_an_assistants_call_has_its_symbols(pieces):
    ours, _ = pieces
    said = "<|tool_call_start|>[f(a='<|im_end|>')]<|tool_call_end|>"
    call = {"function": {"name": "f", "arguments": {"a": "<|im_end|>"}}}
    by_content = Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": said}])
    by_field = Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}])
    encoder = ConversationEncoder(ours, CHAT_FORMATS["lfm2_5"])
    for chat in (by_content, by_field):
        ((ids, trained),) = encoder.examples([chat])[0]
        assert ids[trained].tolist() == [10, *ours.encode("[f(a='<|im_end|>')]"), 11, END]


BEGINNINGS = {"none": ("", ""), "one": ("<|startoftext|>", ""), "many": ("", "<|startoftext|>")}


@pytest.mark.parametrize(("text", "turn"), BEGINNINGS.values(), ids=BEGINNINGS)
def test_exactly_one_bos_everywhere(text, turn, pieces):
    """Whether a template begins the text with one, or each turn."""
    turns = f"{{% for m in messages %}}{turn}{{{{ m.role }}}}:{{{{ m.content }}}}<|im_end|>{{% endfor %}}"
    prompt = f"{{% if add_generation_prompt %}}{turn}assistant:{{% endif %}}"
    encoder = ConversationEncoder(pieces[0], JinjaTemplate(source=text + turns + prompt))
    (prompt,) = encoder.prompts([CHAT])
    assert np.flatnonzero(prompt == BOS).tolist() == [0]
    for texts in encoder.examples([CHAT]):
        for ids, _ in texts:
            assert np.flatnonzero(ids == BOS).tolist() == [0]


def test_the_end_of_an_answer_is_trained_even_where_padding_is_the_same_symbol(pieces):
    """What is trained is told by where it stands, not by what it is."""
    ours = pieces[0]
    same = SimpleNamespace(
        bos_id=BOS, eos_id=2, pad_id=END, fingerprint="", encode_batch=ours.encode_batch, symbol_id=ours.symbol_id
    )
    ((ids, trained),) = ConversationEncoder(same, FORMAT).examples([CHAT])[0]
    assert (ids[-1], trained[-1]) == (END, True)


def test_a_conversation_without_an_answer_is_an_error_that_shows_it(pieces):
    ours = pieces[0]
    asked = Conversation([{"role": "user", "content": "Anyone there?"}], name="chats.jsonl:3")
    message = "chats.jsonl:3: nothing of it is an answer by lfm2, so there is nothing to learn; .*Anyone there"
    with pytest.raises(ValueError, match=message):
        encode_conversations([asked], ours, FORMAT)
    source = "{% for m in messages %}{{ m.content if m.role == 'user' else 'X' }}{% endfor %}"
    deaf = JinjaTemplate(source=source + "{% if add_generation_prompt %}X{% endif %}")
    with pytest.raises(ValueError, match="conversation: nothing of it is an answer by chat template, .*'HiX'"):
        encode_conversations([CHAT._replace(messages=CHAT.messages[1:3])], ours, deaf)


class _Refuses:
    """A format that refuses some conversations."""

    name, source = "picky", ""

    def render_many(self, renderings):
        texts = FORMAT.render_many(renderings)
        bad = [any(message["content"] == "bad" for message in rendering.messages) for rendering in renderings]
        return [ValueError("bad words") if is_bad else text for is_bad, text in zip(bad, texts, strict=True)]


def test_what_a_template_refuses_is_put_aside_and_counted(pieces, tmp_path):
    ours = pieces[0]
    bad = Conversation([{"role": "user", "content": "bad"}, *CHAT.messages], name="chats.jsonl:2")
    with Quarantine(tmp_path / "bad.jsonl") as quarantine:
        examples = encode_conversations([CHAT, bad, CHAT], ours, _Refuses(), quarantine)
    assert (len(examples), examples.conversations, examples.refused) == (2, 2, 1)
    assert quarantine.counts.bad == {"refused": 1}
    assert quarantine.counts.first["where"] == "chats.jsonl:2"
    with pytest.raises(ValueError, match="chats.jsonl:2: bad words"):
        encode_conversations([CHAT, bad], ours, _Refuses())
    with pytest.raises(ValueError, match="chats.jsonl:2: bad words"):
        ConversationEncoder(ours, _Refuses()).prompts([CHAT, bad])
    with Quarantine(tmp_path / "bad.jsonl") as quarantine:
        with pytest.raises(ValueError, match="there is no conversation to learn from, of 1 with 1 refused"):
            encode_conversations([bad], ours, _Refuses(), quarantine)


def test_examples_are_kept_as_they_were_encoded(pieces, monkeypatch):
    """A text or two of each conversation, in their order, however many are encoded together."""
    ours = pieces[0]
    thinks = Conversation(
        [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "c"},
            {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"},
        ]
    )  # fmt: skip
    chats, chat_format = [CHAT, thinks, CHAT], CHAT_FORMATS["lfm2_5"]
    expected = [example for found in ConversationEncoder(ours, chat_format).examples(chats) for example in found]
    monkeypatch.setattr("data_pipelines.conversations.examples._TOGETHER", 2)
    examples = encode_conversations(iter(chats), ours, chat_format)
    assert len(expected) == len(examples) == 4
    for number, (ids, trained) in enumerate(expected):
        np.testing.assert_array_equal(examples[number][0], ids)
        np.testing.assert_array_equal(examples[number][1], trained)
    assert examples.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert examples.trained_tokens == sum(trained.sum() for _, trained in expected)
    assert pickle.loads(pickle.dumps(examples)).fingerprint == examples.fingerprint


def test_long_conversations_are_rendered_few_at_a_time(pieces, monkeypatch):
    """By what is rendered of them, which an answer more makes one prompt more."""
    rendered = []

    class Counting:
        name, source = "counting", ""

        def render_many(self, renderings):
            texts = FORMAT.render_many(renderings)
            rendered.append(sum(map(len, texts)))
            return texts

    turns = [{"role": "user", "content": "a" * 900}, {"role": "assistant", "content": "b" * 90}] * 10
    long, short = Conversation(turns), Conversation(turns[:2])
    monkeypatch.setattr("data_pipelines.conversations.examples._TOGETHER_CHARACTERS", 50_000)
    examples = encode_conversations([long] * 3 + [short] * 12, pieces[0], Counting())
    assert examples.conversations == 15
    assert len(rendered) == 4 and max(rendered) < 150_000  # a long one is 100,000 characters, a short one 2,000


def test_fingerprints_differ_where_anything_does():
    one = (np.array([1, 5, 6]), np.array([False, True, True]))
    two = (np.array([1, 7]), np.array([False, True]))
    settings = {"conversations": 2, "refused": 0, "tokenizer": "a"}
    several = [
        Examples([one, two], **settings), Examples([two, one], **settings), Examples([one, two], **settings | {"tokenizer": "b"}),
        Examples([(one[0], np.array([False, False, True])), two], **settings),
        Examples([(np.array([1, 5]), one[1][:2]), (np.array([6, 1, 7]), np.array([True, False, True]))], **settings),
    ]  # fmt: skip
    assert len({examples.fingerprint for examples in several}) == len(several)
