"""What the server does not let happen, whoever asks: keys, bounds, clients that leave or do not read, an engine that fails."""

import contextlib
import dataclasses
import http.client
import json
import logging
import socket
import threading
from urllib.parse import urlsplit

import pytest
from etils import epath

from experiments.benchmarks.serve_fuzz import KEY, KINDS, LIMITS, Campaign, Config, small_model
from experiments.serve.app import Service
from experiments.serve.chat import ChatFormat
from experiments.serve.requests import Limits
from experiments.serve.runner import EngineFailed, QueueFull, Runner
from experiments.serve.server import listen, serving
from lfm_jax.generation import EngineConfig, Request, SamplingConfig
from lfm_jax.interop.chat_template import render

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
SHORT = {"prompt": [1, 50, 60], "max_tokens": 2, "temperature": 0, "return_token_ids": True}
LONG = {"prompt": [1, 50, 60], "max_tokens": 200, "temperature": 0, "stream": True}
GREEDY = SamplingConfig(max_new_tokens=200, temperature=0)
SECRET = "the prompt that nobody may see"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """With one slot: where it is not given back, nobody is answered any more."""
    return small_model(epath.Path(tmp_path_factory.mktemp("model")), EngineConfig(slots=1, steps=4, prefix_bytes=1 << 22))


@contextlib.contextmanager
def served(made, *, key="", listening=None, **limits):
    """(service, port). When it ends, nobody has a slot any more."""
    engine, tokenizer = made
    limits, chat = Limits(**limits), ChatFormat(tokenizer)
    service = Service("small", Runner(engine, limits.answers), tokenizer, chat, limits, context=engine.context, key=key)
    with serving(service, listening or listen("127.0.0.1", 0)) as url:
        yield service, urlsplit(url).port
    assert (engine.active, engine.waiting, service.runner.held) == (0, 0, 0)


class Gate:
    """The engine takes as many steps as are allowed, and waits then."""

    def __init__(self, engine, monkeypatch):
        self._allowed, step = threading.Semaphore(0), engine.step

        def gated():
            assert self._allowed.acquire(timeout=60)
            return step()

        monkeypatch.setattr(engine, "step", gated)

    def allow(self, steps):
        self._allowed.release(steps)

    def close(self):
        while self._allowed.acquire(blocking=False):
            pass


@pytest.fixture
def gate(made, monkeypatch):
    return Gate(made[0], monkeypatch)


def begin(port, path, content=None, method="POST", **headers):
    """A connection whose request has been sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, data, headers)
    return connection


def head(length):
    """Of a completion, for a socket."""
    lines = (f"POST {COMPLETION} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join((*lines, "", "")).encode()


def end(connection):
    """(status, headers, content)."""
    with contextlib.closing(connection):
        response = connection.getresponse()
        data = response.read()
    return response.status, response.headers, json.loads(data) if "json" in response.headers["content-type"] else data.decode()


def ask(port, path, content=None, method="POST", **headers):
    return end(begin(port, path, content, method, **headers))


def first_event(connection):
    """Of a stream; the response goes on."""
    response = connection.getresponse()
    assert response.status == 200
    return response, response.readline()


def wait_until(port, **load):
    """Until the server says that it has so many `requests` or `answers`; asked again and again."""
    for _ in range(100_000):
        said = ask(port, "/health", method="GET")[2]
        if said | load == said:
            return
    raise AssertionError(f"never {load}, but {said}")


def good(port, **headers):
    status, _, answer = ask(port, COMPLETION, SHORT, **headers)
    return status == 200 and len(answer["choices"][0]["token_ids"]) == 2


@pytest.mark.parametrize("route", ["GET /v1/models", f"POST {COMPLETION}", f"POST {CHAT}", "GET /none", "PUT /v1"])
def test_the_key_is_asked_for_everywhere(made, route):
    method, path = route.split()
    with served(made, key="secret") as (_, port):
        assert ask(port, path, SHORT, method)[0] == 401
        for given in ("Bearer wrong", "secret", "Bearer secre", "Bearer secrets", "bearer", ""):
            status, headers, answer = ask(port, path, SHORT, method, Authorization=given)
            assert (status, headers["www-authenticate"], answer["error"]["code"]) == (401, "Bearer", "invalid_api_key")
        assert ask(port, path, SHORT, method, Authorization="Bearer secret")[0] in (200, 400, 404)
        assert ask(port, "/health", method="GET")[0] == 200 and ask(port, "/", method="GET")[0] == 200


def test_the_key_is_compared_in_constant_time(made, monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda given, key: compared.append((given, key)) or given == key)
    with served(made, key="secret") as (_, port):
        ask(port, "/v1/models", method="GET", Authorization="Bearer wr\u00f6ng")
        assert ask(port, "/v1/models", method="GET", Authorization="Bearer secret")[0] == 200
    assert compared == [("Bearer wr\u00f6ng".encode("latin-1"), b"Bearer secret"), (b"Bearer secret", b"Bearer secret")]


def test_without_a_key_only_the_own_name_is_answered(made):
    """A page of elsewhere whose name is made to lead to this machine sends its own name."""
    with served(made) as (_, port):
        for host in ("localhost", f"localhost:{port}", "127.0.0.1", "[::1]:80"):
            assert ask(port, "/health", method="GET", Host=host)[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", ""):
            status, _, answer = ask(port, "/v1/models", method="GET", Host=host)
            assert status == 403 and "by the name localhost alone" in answer["error"]["message"]


def test_unknown_routes_methods_and_types(made):
    with served(made) as (_, port):
        assert [ask(port, path, SHORT)[0] for path in ("/none", "/v1/embeddings", "/health")] == [404, 404, 405]
        assert ask(port, COMPLETION, method="GET")[0] == 405
        assert ask(port, "/none", SHORT)[2]["error"]["type"] == "invalid_request_error"
        status, _, answer = ask(port, COMPLETION, SHORT, Content_Type="text/plain")
        assert status == 415 and "send content-type: application/json" in answer["error"]["message"]


def test_a_body_has_a_most_size(made):
    with served(made, body_bytes=1000) as (_, port):
        fitting = json.dumps(SHORT).encode()
        assert ask(port, COMPLETION, fitting.ljust(1000))[0] == 200
        status, headers, answer = ask(port, COMPLETION, fitting.ljust(1001))
        assert (status, headers["connection"]) == (413, "close") and "more than 1000 bytes" in answer["error"]["message"]
        # Said to be too large: nothing of it is waited for.
        with socket.create_connection(("127.0.0.1", port)) as large:
            large.sendall(head(1001))
            assert large.makefile("rb").read().startswith(b"HTTP/1.1 413 ")
        # Not said: counted as it comes.
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", COMPLETION, iter([b" " * 600] * 2), {"Content-Type": "application/json"}, encode_chunked=True)
        assert end(connection)[0] == 413
        assert good(port)


def test_a_body_must_come_in_time(made):
    with served(made, arrival_seconds=0.2) as (_, port), socket.create_connection(("127.0.0.1", port)) as slow:
        slow.settimeout(60)
        slow.sendall(head(9) + b"{")
        answer = slow.makefile("rb").read()  # to its end: the connection is closed
        assert answer.startswith(b"HTTP/1.1 408 ") and b"the body has not come in 0.2 seconds" in answer


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", GET[:30], GET, GET + GET[:30]])
def test_a_head_must_come_in_time(made, sent):
    with served(made, arrival_seconds=0.2) as (_, port), socket.create_connection(("127.0.0.1", port)) as slow:
        slow.settimeout(60)
        slow.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            while slow.recv(1 << 16):
                pass


def test_a_request_too_many_is_told_to_come_again(made, gate):
    with served(made, requests=2) as (_, port):
        held = [begin(port, COMPLETION, LONG) for _ in range(2)]
        wait_until(port, answers=2)
        status, headers, answer = ask(port, COMPLETION, SHORT)
        assert (status, headers["retry-after"], answer["error"]["code"]) == (429, "1", "rate_limit_exceeded")
        gate.allow(1000)
        assert [end(connection)[0] for connection in held] == [200, 200]
        assert good(port)


def test_an_answer_too_many_is_told_to_come_again(made, gate):
    with served(made, answers=4, choices=4) as (_, port):
        held = begin(port, COMPLETION, LONG | {"n": 3, "max_tokens": 3})
        wait_until(port, answers=3)
        status, headers, answer = ask(port, COMPLETION, SHORT | {"n": 2})
        assert status == 429 and headers["retry-after"] == "1"
        assert "3 answers are under way or waiting, at most 4 are taken" in answer["error"]["message"]
        fits = begin(port, COMPLETION, SHORT)
        gate.allow(1000)
        assert end(held)[0] == end(fits)[0] == 200


def test_an_answer_that_has_not_begun_when_its_time_is_up_is_none(made, gate):
    with served(made, seconds=0.2) as (_, port):
        for stream in (True, False):
            status, _, answer = ask(port, COMPLETION, LONG | {"stream": stream})
            assert status == 408 and "there is no answer after 0.2 seconds" in answer["error"]["message"]
        gate.allow(1000)
        wait_until(port, answers=0)


def test_an_answer_is_cut_off_when_its_time_is_up(made, gate):
    for seconds in (0.5, 5, 50):  # however slow the machine: it must have begun
        with served(made, seconds=seconds) as (_, port):
            connection = begin(port, COMPLETION, LONG | {"stream": False, "return_token_ids": True})
            gate.allow(2)
            status, _, answer = end(connection)
            gate.allow(1000)
        if status == 200:
            break
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["finish_detail"]) == ("length", "time")
    assert 0 < len(choice["token_ids"]) == answer["usage"]["completion_tokens"] < 200


class Reading:
    """Tokenisation and the template of chats begin, and end when they may."""

    def __init__(self, tokenizer, monkeypatch):
        self.begun, self.may_end = threading.Event(), threading.Event()
        monkeypatch.setattr(tokenizer, "encode_batch", self._held(tokenizer.encode_batch))
        monkeypatch.setattr("experiments.serve.chat.render", self._held(render))

    def _held(self, read):
        def held(*given, **named):
            self.begun.set()
            assert self.may_end.wait(60)
            return read(*given, **named)

        return held


@pytest.fixture
def reading(made, monkeypatch):
    held = Reading(made[1], monkeypatch)
    yield held
    held.may_end.set()


TEXTS = [(COMPLETION, {"prompt": "a text"}), (CHAT, {"messages": [{"role": "user", "content": "a text"}]})]


@pytest.mark.parametrize(("path", "text"), TEXTS)
def test_a_text_that_takes_long_to_read_keeps_nobody_waiting(made, reading, path, text):
    """It is tokenised, and its template rendered, beside the loop that answers the others."""
    with served(made) as (_, port):
        slow = begin(port, path, text | {"max_tokens": 2, "temperature": 0})
        assert reading.begun.wait(60)
        assert ask(port, "/health", method="GET")[2] == {"status": "ok", "requests": 1, "answers": 0}
        assert good(port) and not reading.may_end.is_set()
        reading.may_end.set()
        assert end(slow)[0] == 200


@pytest.mark.parametrize(("path", "text"), TEXTS)
def test_a_text_that_takes_longer_to_read_than_there_is_time_is_told_so(made, reading, path, text):
    for seconds in (0.2, 5, 50):  # however slow the machine: it must have begun
        with served(made, seconds=seconds) as (service, port):
            status, _, answer = ask(port, path, text)
            wait_until(port, requests=0)
        if reading.begun.is_set():
            break
    assert status == 408 and f"there is no answer after {seconds:g} seconds; come again" in answer["error"]["message"]
    assert service.runner.tokens == 0


def test_a_client_that_leaves_gives_its_slot_back(made, gate):
    with served(made) as (service, port):
        for stream in (True, False):
            connection = begin(port, COMPLETION, LONG | {"stream": stream})
            wait_until(port, answers=1)
            if stream:
                gate.allow(1)
                first_event(connection)[0].close()
            connection.close()  # the response of a stream, too, or its socket would stay
            wait_until(port, requests=0)
            # What it asked for takes 50 steps; after the one that waited at the gate, nobody wants any more.
            gate.allow(1000)
            wait_until(port, answers=0)
            assert service.runner.tokens < 30
            gate.close()
        gate.allow(1000)
        assert good(port)


def test_a_client_that_does_not_read_is_given_up(made, gate):
    """More than all buffers between the two hold is written, and none of it read."""
    listening = listen("127.0.0.1", 0)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    with served(made, listening=listening, read_seconds=0.2, choices=8) as (service, port), socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        slow.connect(("127.0.0.1", port))
        body = json.dumps(LONG | {"n": 8, "logprobs": 20}).encode()
        slow.sendall(head(len(body)) + body)
        gate.allow(60)
        wait_until(port, answers=8)
        wait_until(port, requests=0)
        gate.allow(1000)
        wait_until(port, answers=0)
        assert service.runner.tokens < 400 < 8 * 200
        assert good(port)


def test_an_engine_that_fails_ends_only_what_it_worked_on(made, monkeypatch, caplog):
    engine, step, failing = made[0], made[0].step, threading.Event()

    def sometimes():
        if failing.is_set():
            failing.clear()
            raise RuntimeError(SECRET)
        return step()

    monkeypatch.setattr(engine, "step", sometimes)
    with served(made) as (service, port), caplog.at_level(logging.INFO):
        for content in (SHORT | {"prompt": SECRET}, LONG):
            failing.set()
            status, _, answer = ask(port, COMPLETION, content)
            assert status == 500 and answer["error"] == {
                "message": "the engine failed on this request", "type": "server_error", "param": None, "code": None
            }  # fmt: skip
            assert good(port)
        with contextlib.closing(begin(port, COMPLETION, LONG)) as connection:
            response, _ = first_event(connection)
            failing.set()
            last = response.read().decode().splitlines()[-2]
        assert last.startswith('data: {"error": {"message": "the engine failed on this request"')
        assert good(port)
    assert "the engine raised RuntimeError in sometimes" in caplog.text and SECRET not in caplog.text


def test_a_mistake_of_ours_says_nothing_of_the_prompt(made, monkeypatch, caplog):
    def fails(self, body):
        raise KeyError(body)

    monkeypatch.setattr("experiments.serve.requests.Reader.completion", fails)
    with served(made) as (_, port):
        status, _, answer = ask(port, COMPLETION, {"prompt": SECRET})
    assert status == 500 and answer["error"]["message"] == "the server failed on this request"
    assert "a request raised KeyError in fails" in caplog.text and SECRET not in caplog.text


def test_nothing_is_logged_of_what_is_asked(made, caplog, capfd):
    with served(made) as (_, port), caplog.at_level(logging.DEBUG):
        ask(port, COMPLETION, SHORT | {"prompt": SECRET})
        ask(port, CHAT, {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 1, "temperature": 0})
        ask(port, COMPLETION, {"prompt": SECRET, "top_q": SECRET})
    assert SECRET not in caplog.text and SECRET not in "".join(capfd.readouterr())


def test_what_takes_longer_than_the_drain_is_told_so(made, gate):
    told = []
    with served(made, drain_seconds=0.2) as (_, port):
        streaming = begin(port, COMPLETION, LONG)
        gate.allow(1)
        response, _ = first_event(streaming)
        waiting = begin(port, COMPLETION, SHORT)
        wait_until(port, requests=2)

        def read():
            told.extend([response.read().decode(), end(waiting)])
            gate.allow(1000)  # without which the engine would not end

        reader = threading.Thread(target=read)
        reader.start()
    reader.join()
    streaming.close()
    stream, (status, _, answer) = told
    assert '"the server ends; ask again"' in stream and "[DONE]" not in stream
    assert (status, answer["error"]["message"]) == (503, "the server ends; ask again")


def test_a_runner_takes_all_or_none_and_says_why_not(made):
    engine = made[0]
    runner, told, done = Runner(engine, most=3), [], threading.Event()

    def deliver(event):
        told.append(event)
        done.set()

    request = Request(prompt=(1, 2), sampling=GREEDY)
    runner.start()
    # Bounds are checked before; but if one were forgotten, the engine would say so, of this request alone.
    runner.submit([request, Request(prompt=(9999,))], deliver)
    assert done.wait(60) and isinstance(told[0], ValueError) and runner.held == 0
    with pytest.raises(QueueFull, match="0 answers are under way or waiting, at most 3 are taken"):
        runner.submit([request] * 4, deliver)
    told.clear()
    ticket = runner.submit([request] * 3, deliver)
    runner.stop()
    assert isinstance(told[-1], EngineFailed) and str(told[-1]) == "the server ends"
    assert runner.held == 0 and not ticket.numbers and not runner.alive and engine.active == 0


def test_a_runner_outlives_whoever_waited(made):
    def gone(event):
        raise RuntimeError("Event loop is closed")

    runner, done = Runner(made[0], most=3), threading.Event()
    runner.start()
    runner.submit([Request(prompt=(1, 2), sampling=GREEDY)], gone)
    runner.submit([Request(prompt=(1, 3), sampling=GREEDY)], lambda event: done.set())
    assert done.wait(60)
    runner.stop()
    assert runner.held == 0


def test_mutated_requests_are_answered_and_leave_nothing_behind(made):
    """A small part of the campaign whose table is docs/benchmarks/serve_fuzz.md."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    with served(made, key=KEY, **(dataclasses.asdict(LIMITS) | {"arrival_seconds": 0.3})) as (service, port):
        campaign = Campaign(port)
        # Without those whose settings need programs of their own, which take seconds to compile.
        campaign.run(120, seed=1, kinds=[kind for kind in KINDS if kind != "extreme"])
    assert campaign.odd == []
    assert sum(row["next_good_served"] for row in campaign.rows.values()) == 120
    assert len(campaign.rows) == len(set(KINDS)) - 1 and service.answered[200] > 240


def test_a_campaign_without_requests_is_refused():
    with pytest.raises(ValueError, match="requests must be positive, got 0"):
        Config(requests=0)


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 100, "top_p": 1e-300, "top_k": 1_000_000, "min_p": 1, "repetition_penalty": 100},
        {"temperature": 1e-5, "top_p": 1e-7, "top_k": 1, "min_p": 1e-300, "repetition_penalty": 0.01, "seed": 2**32 - 1},
    ],
)
def test_settings_at_their_ends_are_answered(made, extreme):
    with served(made) as (_, port):
        status, _, answer = ask(port, COMPLETION, SHORT | extreme | {"max_tokens": 20, "logprobs": 20})
        assert status == 200 and answer["usage"]["completion_tokens"] == 20
        assert all(0 <= token < 320 for token in answer["choices"][0]["token_ids"])
        assert good(port)
