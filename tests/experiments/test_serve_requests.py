"""Bodies of requests: what is read of them, and that every bound is held before anything is tokenised."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.serve.requests import Limits, Reader, RequestError, read_json
from lfm_jax.generation import LoopConfig, SamplingConfig

LIMITS = Limits(choices=4, answers=8, prompt_characters=100, new_tokens=32)
READER = Reader("small", vocab_size=50, context=64, limits=LIMITS)
USER = {"role": "user", "content": "Hi"}


def body(**fields):
    return json.dumps(fields).encode()


def completion(**fields):
    return READER.completion(body(prompt="a") if not fields else body(**{"prompt": "a"} | fields))


def chat(**fields):
    return READER.chat(body(**{"messages": [USER]} | fields))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no JSON: Expecting value"),
        (b"\xff", "no UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), "no UTF-8"),
        (b"[1]", "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
        (b'{"prompt": NaN}', "NaN is no number in JSON"),
        (b'{"prompt": -Infinity}', "-Infinity is no number in JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "no JSON: Exceeds the limit"),
        (b'{"prompt": "a"', "no JSON"),
        (b'{"a": ' * 33 + b"1" + b"}" * 33, "nested deeper than 32"),
        (b"[" * 4_000_000, "nested deeper than 32"),
        (b'{"' + b'\\"' * 2_000_000, "no JSON"),
        (b'{"' + b"\\", "no JSON"),
    ],
)
def test_what_is_no_json_object_is_refused(data, message):
    with pytest.raises(RequestError, match=message):
        read_json(data)


def depth(value):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(depth, inside), default=0)


TEXTS = st.text(alphabet='[{"\\}]a', max_size=6)
JSON = st.recursive(TEXTS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2))


@given(JSON)
def test_brackets_in_strings_do_not_count_as_nesting(value):
    value = {"a": value}
    wrapped = value
    for _ in range(32 - depth(value)):
        wrapped = {"[": wrapped}
    assert read_json(json.dumps(wrapped).encode()) == wrapped
    with pytest.raises(RequestError, match="nested deeper"):
        read_json(json.dumps({"a": wrapped}).encode())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number in 0..100"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": "1"}, "temperature must be a number"),
        ({"temperature": 1e-6}, "temperature must be 0, which is greedy, or at least 1e-05"),
        ({"temperature": 10**400}, "temperature must be a number"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be a number in 0..1"),
        ({"min_p": -1}, "min_p must be a number"),
        ({"top_k": -1}, "top_k must be a whole number in 0..1000000"),
        ({"top_k": 1.0}, "top_k must be a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number in 0.01..100"),
        ({"seed": -1}, "seed must be a whole number in 0..4294967295"),
        ({"seed": 2**32}, "seed must be a whole number"),
        ({"n": 0}, "n must be a whole number in 1..4"),
        ({"n": 5}, "n must be a whole number in 1..4"),
        ({"n": True}, "n must be a whole number"),
        ({"max_tokens": 0}, "max_tokens must be a whole number in 1..32"),
        ({"max_tokens": 33}, "max_tokens must be a whole number in 1..32"),
        ({"stop": []}, "stop must be a list of 1 to 4 strings"),
        ({"stop": ["a"] * 5}, "stop must be a list of 1 to 4 strings"),
        ({"stop": ""}, "stop: a stop string has 1 to 256 characters"),
        ({"stop": ["a" * 257]}, "stop: a stop string has 1 to 256 characters"),
        ({"stop": [1]}, "stop must be a string"),
        ({"stream": 1}, "stream must be true or false"),
        ({"stream_options": []}, "stream_options must be an object"),
        ({"stream_options": {"include_use": True}}, "stream_options.include_use: no such field. Did you mean 'include_usage'"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage must be true or false"),
        ({"user": 1}, "user must be a string"),
        ({"logit_bias": {"1": 100}}, "logit_bias is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"presence_penalty": True}, "presence_penalty is not supported"),
        ({"tempratur": 1}, "tempratur: no such field. Did you mean 'temperature'"),
        ({"a" * 10_000: 1}, "a{64}: no such field"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds: no such field"),
        ({"chat_template": "{{ 1 }}"}, "chat_template: no such field"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs: no such field"),
        ({"guided_regex": "(a+)+"}, "guided_regex: no such field"),
    ],
)
@pytest.mark.parametrize("read", [completion, chat])
def test_fields_of_both_routes_are_bounded(fields, message, read):
    with pytest.raises(RequestError, match=message) as caught:
        read(**fields)
    assert caught.value.status == 400 and caught.value.param.partition(".")[0] == next(iter(fields))[:64]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": 1}, "prompt must be a list of 1 to 4 strings or lists of ids"),
        ({"prompt": {}}, "prompt must be a list"),
        ({"prompt": []}, "prompt must be a list"),
        ({"prompt": ["a"] * 5}, "prompt must be a list of 1 to 4"),
        ({"prompt": ["a", 1]}, "prompt must be a string"),
        ({"prompt": "\ud800"}, "prompt has half of a surrogate pair"),
        ({"prompt": "a" * 101}, "prompt has 101 characters; at most 100 are read"),
        ({"prompt": ["a" * 51, "b" * 50]}, "prompt has 101 characters"),
        ({"prompt": [1, "a"]}, "prompt: ids must be whole numbers in 0..49"),
        ({"prompt": [50]}, "prompt: ids must be whole numbers in 0..49"),
        ({"prompt": [-1]}, "prompt: ids must be"),
        ({"prompt": [True]}, "prompt: ids must be"),
        ({"prompt": [[]]}, "prompt: 0 ids; 1 to 63 are read"),
        ({"prompt": [1] * 64}, "prompt: 64 ids; 1 to 63 are read"),
        ({"prompt": ["a", "b"], "n": 3}, "2 prompts and n=3 are more than 4 answers"),
        ({"logprobs": 21}, "logprobs must be a whole number in 0..20"),
        ({"logprobs": True}, "logprobs must be a whole number"),
        ({"echo": True}, "echo is not supported"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"suffix": "a"}, "suffix is not supported"),
        ({"messages": []}, "messages: no such field"),
    ],
)
def test_a_completion_is_bounded(fields, message):
    with pytest.raises(RequestError, match=message):
        completion(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": None}, "messages is missing"),
        ({"messages": []}, "messages must be a list of 1 to 1024 messages"),
        ({"messages": [USER] * 1025}, "messages must be a list of 1 to 1024 messages"),
        ({"messages": "Hi"}, "messages must be a list"),
        ({"messages": ["Hi"]}, r"messages\[0\].role must be one of system, developer, user, assistant, tool"),
        ({"messages": [USER, {"role": "root", "content": ""}]}, r"messages\[1\].role must be one of"),
        ({"messages": [{"role": ["user"]}]}, r"messages\[0\].role must be one of"),
        ({"messages": [USER | {"contents": "a"}]}, r"messages\[0\].contents: no such field. Did you mean 'content'"),
        ({"messages": [USER | {"content": 1}]}, r"messages\[0\].content must be a string"),
        ({"messages": [USER | {"content": "\udc00"}]}, "half of a surrogate pair"),
        ({"messages": [USER | {"name": 1}]}, r"messages\[0\].name must be a string"),
        ({"messages": [USER | {"content": []}]}, "content must be a list of 1 to 1024 parts"),
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]}, "only parts"),
        ({"messages": [USER | {"content": [{"type": "text", "text": 1}]}]}, "content must be a string"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, r"messages\[0\].tool_calls is not read"),
        ({"messages": [USER | {"content": "a" * 101}]}, "messages has 116 characters"),
        ({"tools": [{"type": "function", "function": {"name": "a" * 100}}]}, "characters; at most 100 are read"),
        ({"tools": [{"type": "function", "function": {"\ud800": 1}}]}, "tools has half of a surrogate pair"),
        ({"tools": [{"type": "function"}]}, "tools: a tool is"),
        ({"tools": [{"function": {}}]}, "tools: a tool is"),
        ({"tools": [1] * 129}, "tools must be a list of 1 to 128 tools"),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format is not supported"),
        ({"logprobs": 2}, "logprobs must be true or false"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs must be a whole number in 0..20"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"max_completion_tokens": 33}, "max_completion_tokens must be a whole number in 1..32"),
        ({"prompt": "a"}, "prompt: no such field"),
    ],
)
def test_a_chat_is_bounded(fields, message):
    with pytest.raises(RequestError, match=message):
        chat(**fields)


@pytest.mark.parametrize("read", [completion, chat])
def test_another_model_is_not_found(read):
    assert read(model="small").n == 1
    with pytest.raises(RequestError, match="has the model 'small' alone") as caught:
        read(model="gpt-4o")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize("read", [completion, chat])
def test_what_clients_send_without_meaning_it_is_taken(read):
    plain = read()
    assert plain.sampling == {"temperature": 1.0, "top_p": 1.0} and plain.max_tokens is None and plain.log_probs is None
    assert read(frequency_penalty=0, presence_penalty=0.0, logit_bias={}, user="me", stop=None, n=None, stream=False) == plain
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}
    assert read(**sampling).sampling == sampling


def test_prompts_of_every_kind():
    assert [completion(prompt=prompt).prompts for prompt in ("a", ["a", "b"], [3, 4], [[3], [4, 5]], ["a", [3]])] == [
        ("a",), ("a", "b"), ((3, 4),), ((3,), (4, 5)), ("a", (3,))
    ]  # fmt: skip
    assert completion(prompt="").prompts == ("",)


def test_messages_as_templates_read_them():
    said = [
        {"role": "developer", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]},
        {"role": "assistant", "content": None, "refusal": None},
        {"role": "tool", "content": "4", "tool_call_id": "x", "name": "add"},
    ]
    assert chat(messages=said).messages == (
        {"role": "system", "content": "<|im_end|>"}, {"role": "assistant", "content": ""},
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "x"},
    )  # fmt: skip
    asked = chat(max_tokens=3, max_completion_tokens=5, logprobs=True, stream_options={"include_usage": True})
    assert (asked.max_tokens, asked.log_probs, asked.include_usage) == (5, 0, True)


def test_each_answer_is_drawn_by_a_seed_of_its_own():
    random.seed(0)
    asked = completion(
        prompt=[[1], [2]], n=2, seed=2**32 - 2, max_tokens=7, stop=["x"], logprobs=3, temperature=0.5, stop_loops=True
    )
    requests = READER.requests(asked, asked.prompts, (2,))
    assert [request.prompt for request in requests] == [(1,), (1,), (2,), (2,)]
    assert [request.sampling.seed for request in requests] == [2**32 - 2, 2**32 - 1, 0, 1]
    assert requests[0].sampling == SamplingConfig(max_new_tokens=7, temperature=0.5, top_p=1.0, seed=2**32 - 2)
    assert (requests[0].stop_ids, requests[0].stop_strings, requests[0].top_log_probs) == ((2,), ("x",), 3)
    assert requests[0].loop == LoopConfig()
    unseeded = READER.requests(completion(prompt=[1], n=4), [(1,)], ())
    assert len({request.sampling.seed for request in unseeded}) == 4 and unseeded[0].loop is None


def test_how_long_an_answer_may_be():
    of = lambda asked, length: READER.requests(asked, [(1,) * length], ())[0].sampling.max_new_tokens
    assert of(completion(), 1) == 16
    assert of(chat(), 1) == 32  # the limit
    assert of(chat(), 60) == 4  # the room that is left
    assert of(chat(max_tokens=4), 60) == 4
    for asked, length, param in ((completion(), 49, "prompt"), (chat(max_tokens=5), 60, "messages"), (chat(), 64, "messages")):
        with pytest.raises(RequestError, match="do not fit into a context of 64; shorten the prompt") as caught:
            of(asked, length)
        assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")


def test_limits_that_make_no_sense_are_refused():
    for field in ("body_bytes", "seconds", "answers"):
        with pytest.raises(ValueError, match=f"{field} must be positive and finite, got 0"):
            Limits(**{field: 0})
    with pytest.raises(ValueError, match="seconds must be positive and finite, got inf"):
        Limits(seconds=float("inf"))
    with pytest.raises(ValueError, match="answers must be at least choices, 16"):
        Limits(answers=15)
