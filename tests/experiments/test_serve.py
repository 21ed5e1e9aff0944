"""The server, asked by OpenAI's client: what it answers is what the engine says, and a conversation reads only what is new."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import openai
import pytest
from conftest import ROOT
from etils import epath

from experiments.benchmarks.serve_fuzz import MODEL, small_model
from experiments.serve import Config, main, read_key
from experiments.serve.app import Service
from experiments.serve.chat import ChatFormat
from experiments.serve.requests import Limits
from experiments.serve.runner import Runner
from experiments.serve.server import listen, serving
from lfm_jax.configuration import ConfigError
from lfm_jax.generation import EngineConfig, LoopConfig, Request, SamplingConfig
from lfm_jax.generation.prefixes import Prefixes
from lfm_jax.interop import GenerationSettings, export_folder

PROMPT, TALK = "def f(x):", [{"role": "user", "content": "So did the cat"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return epath.Path(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def made(folder):
    return small_model(folder, EngineConfig(slots=2, steps=4, prefix_bytes=1 << 22))


@contextlib.contextmanager
def served(made, *, key="", listening=None, **limits):
    """(service, URL). When it ends, nobody has a slot any more."""
    engine, tokenizer = made
    limits = Limits(**limits)
    service = Service(
        "small", Runner(engine, limits.answers), tokenizer, ChatFormat(tokenizer), limits, context=engine.context, key=key
    )
    with serving(service, listening or listen("127.0.0.1", 0)) as url:
        yield service, url
    assert (engine.active, engine.waiting, service.runner.held) == (0, 0, 0)


@pytest.fixture(scope="module")
def client(made):
    with served(made) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def direct(made, prompt, *, stop_ids=None, stop=(), loop=None, top=2, **sampling):
    engine, tokenizer = made
    stop_ids = (tokenizer.eos_id,) if stop_ids is None else stop_ids
    sampling = SamplingConfig(**{"temperature": 0.0, "top_p": 1.0} | sampling)
    request = Request(
        prompt=tuple(prompt), sampling=sampling, stop_ids=stop_ids, stop_strings=stop, loop=loop, top_log_probs=top
    )
    return engine.run([request])[0]


def ids_of(made, text=PROMPT):
    return (made[1].bos_id, *made[1].encode(text))


def complete(client, **fields):
    fixed = {"model": "small", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 2}
    return client.completions.create(**fixed | fields)


def talk(client, **fields):
    fixed = {"model": "small", "messages": TALK, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    return client.chat.completions.create(**fixed | fields)


def test_a_completion_is_what_the_engine_says(client, made):
    answer = complete(client, extra_body={"return_token_ids": True})
    expected, (choice,) = direct(made, ids_of(made), max_new_tokens=12), answer.choices
    assert (choice.text, choice.finish_reason) == (expected.text, "length")
    assert (choice.prompt_token_ids, choice.token_ids) == (list(ids_of(made)), expected.tokens)
    np.testing.assert_allclose(choice.logprobs.token_logprobs, expected.log_probs, atol=1e-5)
    assert choice.logprobs.tokens == [made[1].decode([token]) for token in expected.tokens]
    for told, top in zip(choice.logprobs.top_logprobs, expected.top, strict=True):
        assert told == pytest.approx({made[1].decode([token]): value for token, value in reversed(top)}, abs=1e-5)
    lengths = [len(token) for token in choice.logprobs.tokens]
    assert choice.logprobs.text_offset == [sum(lengths[:index]) for index in range(12)]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        len(ids_of(made)), 12, len(ids_of(made)) + 12
    )  # fmt: skip
    assert (answer.object, answer.model) == ("text_completion", "small")


def test_a_completion_of_ids_is_one_of_their_text(client, made):
    assert complete(client, prompt=list(ids_of(made))).choices[0].text == complete(client).choices[0].text


def test_every_prompt_and_every_choice_is_drawn_by_itself(client, made):
    answer = complete(client, prompt=[PROMPT, "cats"], n=2, temperature=0.9, seed=5)
    prompts = [ids_of(made), ids_of(made), ids_of(made, "cats"), ids_of(made, "cats")]
    expected = [direct(made, ids, temperature=0.9, seed=5 + i, max_new_tokens=12).text for i, ids in enumerate(prompts)]
    assert [choice.text for choice in answer.choices] == expected and len(set(expected)) == 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == len(prompts[0]) + len(prompts[2])


def test_a_streamed_completion_is_the_whole_one_in_pieces(client):
    fields = {"n": 2, "temperature": 0.9, "seed": 5, "extra_body": {"return_token_ids": True}}
    whole = complete(client, **fields)
    chunks = list(complete(client, **fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert len(chunks) > 6 and {chunk.id for chunk in chunks} == {chunks[0].id}
    for index, choice in enumerate(whole.choices):
        parts = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(part.text for part in parts) == choice.text
        assert [token for part in parts for token in part.token_ids] == choice.token_ids
        assert [offset for part in parts for offset in part.logprobs.text_offset] == choice.logprobs.text_offset
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
        prompts = [part.prompt_token_ids for part in parts if hasattr(part, "prompt_token_ids")]
        assert prompts == [choice.prompt_token_ids] and hasattr(parts[0], "prompt_token_ids")


def test_a_chat_is_what_the_engine_says_of_its_template(client, made):
    chat = ChatFormat(made[1])
    answer = talk(client, extra_body={"return_token_ids": True})
    expected = direct(made, chat.prompt(TALK), stop_ids=chat.stop_ids, max_new_tokens=12)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (choice.prompt_token_ids, choice.token_ids) == (list(chat.prompt(TALK)), expected.tokens)
    np.testing.assert_allclose([entry.logprob for entry in choice.logprobs.content], expected.log_probs, atol=1e-5)
    for entry, top in zip(choice.logprobs.content, expected.top, strict=True):
        assert [each.logprob for each in entry.top_logprobs] == pytest.approx([value for _, value in top], abs=1e-5)
        assert entry.bytes in (None, list(entry.token.encode()))
    chunks = list(talk(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[0].object == "chat.completion.chunk"


def test_tools_are_in_the_prompt(client, made):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    answer = talk(client, tools=tools, extra_body={"return_token_ids": True}, max_tokens=1)
    assert answer.choices[0].prompt_token_ids == list(ChatFormat(made[1]).prompt(TALK, tools))


def test_an_answer_ends_by_a_string_by_a_symbol_and_by_a_loop(client, made):
    text = complete(client).choices[0].text
    stop = text[len(text) // 2 :][:2]
    answer = complete(client, stop=[stop, "never"]).choices[0]
    assert (answer.text, answer.finish_reason) == (text[: text.index(stop)], "stop")
    # An untrained model says a symbol as often as another token.
    chat = ChatFormat(made[1])
    prompt = chat.prompt(TALK)
    of = lambda seed: direct(made, prompt, stop_ids=chat.stop_ids, max_new_tokens=60, temperature=1.5, seed=seed)
    seed = next(seed for seed in range(40) if of(seed).finish_reason == "stop")
    ended = talk(client, temperature=1.5, seed=seed, max_tokens=60, extra_body={"return_token_ids": True})
    choice = ended.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", of(seed).text)
    assert choice.token_ids[-1] in chat.stop_ids and choice.logprobs.content[-1].token in ("<|im_end|>", "<|endoftext|>")
    # Who is rewarded for repetition comes to loop.
    extra = {"stop_loops": True, "return_token_ids": True, "repetition_penalty": 0.1}
    looped = complete(client, max_tokens=200, extra_body=extra).choices[0]
    expected = direct(made, ids_of(made), max_new_tokens=200, loop=LoopConfig(), repetition_penalty=0.1)
    assert expected.finish_reason == "loop"
    assert (looped.token_ids, looped.finish_reason, looped.finish_detail) == (expected.tokens, "stop", "loop")


def test_the_second_turn_reads_only_what_is_new(client, made, monkeypatch):
    """And says the same as a server that remembers nothing."""
    engine, tokenizer = made
    prompt = ChatFormat(tokenizer).prompt(TALK)
    of = lambda seed: direct(made, prompt, temperature=1.0, seed=seed, max_new_tokens=3)
    # Untrained, it seldom says what its tokenizer would have made of the same text.
    seed = next(seed for seed in range(999) if tokenizer.encode(of(seed).text) == of(seed).tokens)
    engine.prefixes = Prefixes(engine.config, engine.settings.prefix_bytes)
    first = talk(client, temperature=1.0, seed=seed, max_tokens=3, extra_body={"return_token_ids": True}).choices[0]
    messages = [*TALK, {"role": "assistant", "content": first.message.content}, {"role": "user", "content": "and the mat"}]
    before = engine.prompt_tokens_read
    second = talk(client, messages=messages, extra_body={"return_token_ids": True})
    read = len(first.prompt_token_ids) + 2  # of its own last word the model has not been told
    assert second.usage.prompt_tokens_details.cached_tokens == read
    assert engine.prompt_tokens_read - before == second.usage.prompt_tokens - read
    monkeypatch.setattr(engine, "prefixes", Prefixes(engine.config, 0))
    cold = talk(client, messages=messages, extra_body={"return_token_ids": True})
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert cold.choices[0].token_ids == second.choices[0].token_ids


def test_mistakes_are_told_in_openais_words(client):
    with pytest.raises(openai.BadRequestError, match="top_q: no such field. Did you mean 'top_p'") as caught:
        complete(client, extra_body={"top_q": 0.5})
    assert caught.value.param == "top_q" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="has the model 'small' alone") as caught:
        talk(client, model="large")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="do not fit into a context of 256") as caught:
        complete(client, prompt=[1] * 250)
    assert caught.value.code == "context_length_exceeded"
    assert [model.id for model in client.models.list()] == ["small"]


def test_the_page_asks_for_nothing_from_elsewhere(client):
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    connection.close()
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "/v1/chat/completions" in page and "://" not in page and "innerHTML" not in page


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 may be reached from other machines, so clients need a key: give api_key_file"),
        ({"host": ""}, "may be reached from other machines"),
        ({"port": -1}, "port must be in 0..65535, got -1"),
        ({"port": 65536}, "port must be in 0..65535"),
    ],
)
def test_a_server_for_everybody_needs_a_key(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(init_from="model", **fields)
    assert Config(init_from="model").host == "127.0.0.1"
    assert Config(init_from="model", host="0.0.0.0", api_key_file="key").port == 8000


def test_the_key_is_the_first_line_of_its_file(tmp_path):
    assert read_key("") == ""
    (tmp_path / "key").write_text(" secret \nnot this\n")
    assert read_key(str(tmp_path / "key")) == "secret"
    for content in ("", "\nsecret", "s\u00e9cret"):
        (tmp_path / "key").write_text(content)
        with pytest.raises(ConfigError, match="must be a key of ASCII characters"):
            read_key(str(tmp_path / "key"))
    with pytest.raises(ConfigError, match="api_key_file: .*none cannot be read"):
        read_key(str(tmp_path / "none"))


def test_what_serving_needs_is_told(monkeypatch, tmp_path):
    config = Config(init_from="model")
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="serving needs starlette and uvicorn: pip install"):
            main(config, tmp_path)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ConfigError, match="serve runs in one process, not in 2"):
        main(config, tmp_path)


def test_an_address_that_is_taken_is_told():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="cannot be had"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_a_run_serves_a_folder_until_it_is_told_to_end_and_ends_what_it_has_begun(made, folder, tmp_path):
    """SIGTERM in the middle of a stream: the stream comes to its end, then the run does, and its figures are there."""
    engine, tokenizer = made
    model, workdir = tmp_path / "model", tmp_path / "run"
    export_folder(
        MODEL, *engine._model, epath.Path(model), tokenizer=folder / "tokenizer", dtype="float32",
        generation=GenerationSettings(bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id),
    )  # fmt: skip
    arguments = [
        "--config=configs/serve.py", f"--workdir={workdir}", f"--config.init_from={model}", "--config.port=0",
        "--config.engine.steps=1", "--config.compute.dtype=float32",
    ]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": ""}
    command, pipes = [sys.executable, "run.py", *arguments], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
        try:
            line = next((line for line in process.stdout if line.startswith("serving")), "")
            assert re.fullmatch(r"serving model at http://127.0.0.1:\d+, without a key\n", line), process.stderr.read()
            with openai.OpenAI(base_url=f"{line.split()[3].rstrip(',')}/v1", api_key="none", max_retries=0) as client:
                stream = complete(client, model="model", max_tokens=100, stream=True, extra_body={"return_token_ids": True})
                choices = [next(stream).choices[0]]
                process.send_signal(signal.SIGTERM)
                choices += [chunk.choices[0] for chunk in stream]
            _, errors = process.communicate()
        finally:
            process.kill()  # does nothing to one that has ended
    assert [token for choice in choices for token in choice.token_ids] == direct(made, ids_of(made), max_new_tokens=100).tokens
    assert choices[-1].finish_reason == "length"
    assert process.returncode == 0 and errors == ""
    figures = json.loads((workdir / "results.json").read_text())
    assert figures["requests_by_status"] == {"200": 1} and figures["answer_tokens"] == 100
