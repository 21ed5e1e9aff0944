"""Judges against a real local server that fails in every way, and a likelihood against a plain forward pass."""

import http.server
import json
import socket
import threading

import pytest

from data_pipelines.conversations import Conversation
from experiments import judges
from experiments.judges import EndpointJudge, JuryConfig, Opinion, ask, make_jury, normalized, read_scores
from lfm_jax.configuration import ConfigError
from lfm_jax.models import ComputeConfig
from lfm_jax.sharding import MeshConfig

PROMPT = Conversation([{"role": "user", "content": "2 + 2?"}])


@pytest.fixture
def server(monkeypatch):
    """A server that does what is next in `script`, and tells in `asked` what it was asked."""
    script, asked, stop = [], [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, self.headers.get("authorization"), body))
            what = script.pop(0) if len(script) > 1 else script[0]
            if what == "hang":
                stop.wait(20)
            if what in ("hang", "reset"):
                self.close_connection = True
                return
            status, content = what if isinstance(what, tuple) else (200, said(what))
            self.send_response(status)
            self.send_header("location", "http://127.0.0.1:1/elsewhere")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as here:
        here.daemon_threads = True
        thread = threading.Thread(target=here.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        yield f"judge@http://127.0.0.1:{here.server_port}/v1", script, asked
        stop.set()
        here.shutdown()
        thread.join()


def said(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def judge(endpoint, **changes):
    fixed = {"endpoints": (endpoint,), "timeout_seconds": 0.3, "backoff_seconds": 0.0}
    return EndpointJudge(endpoint, JuryConfig(**fixed | changes))


@pytest.mark.parametrize(
    "failure",
    ["hang", "reset", (500, b""), (429, b""), (200, b"no json"), (200, b"[]"), (200, said(None)), "I cannot", '{"scores": [1]}',
     '{"scores": [1, NaN]}', '{"scores": [true, 3]}', '{"scores": [0, 3]}', '{"scores": "12"}'],
)  # fmt: skip
def test_what_fails_is_asked_again_and_then_recorded_without_a_score(server, failure):
    endpoint, script, asked = server
    script[:] = [failure, 'Well. ```{"scores": [1, 10]}```']
    assert [opinion.score for opinion in judge(endpoint).score(PROMPT, ["3", "4"])] == [0.0, 1.0]
    assert [(body["temperature"], body["seed"]) for _, _, body in asked] == [(0.0, 0), (0.7, 1)]
    script[:] = [failure]
    for opinion in judge(endpoint, attempts=2).score(PROMPT, ["3", "4"]):
        assert opinion.score is None and opinion.raw.count(" | ") >= 1
    assert len(asked) == 4


def test_refused_connections_are_waited_for_longer_and_longer(monkeypatch):
    waited = []
    monkeypatch.setattr(judges.time, "sleep", waited.append)
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        found = judge(f"a@http://127.0.0.1:{free.getsockname()[1]}/v1", attempts=9, backoff_seconds=1.0).score(PROMPT, ["3", "4"])
    assert [opinion.score for opinion in found] == [None, None] and "refused" in found[0].raw.lower()
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("status", [401, 404, 302])
def test_what_will_not_change_is_not_asked_again_and_no_redirection_is_followed(server, status, tmp_path):
    endpoint, script, asked = server
    (tmp_path / "key").write_text("secret\n")
    script[:] = [(status, b"")]
    assert judge(endpoint, api_key_file=str(tmp_path / "key")).score(PROMPT, ["3", "4"]) == [Opinion(None, f"HTTP {status}")] * 2
    assert [(path, key) for path, key, _ in asked] == [("/v1/chat/completions", "Bearer secret")]


def test_the_order_is_drawn_and_scores_return_to_their_answers():
    class Length:
        name, threads, absolute = "length", 2, False

        def score(self, prompt, responses):
            return [Opinion(float(len(each)), each) for each in responses]

    answers = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]
    found = ask(Length(), [PROMPT] * 20, [answers] * 20, [[0, number] for number in range(20)])
    assert all(each.scores == [1, 2, 3, 4, 5, 6] and each.raw == answers for each in found)
    assert len({tuple(each.order) for each in found}) > 15 and {each.order[0] for each in found} == set(range(6))
    assert ask(Length(), [PROMPT], [answers], [[0, 7]])[0] == found[7]


def test_scores_are_normalised_by_prompt():
    assert normalized([3, None, 7, 5]) == [0, None, 1, 0.5] and normalized([2, 2, None]) == [0.5, 0.5, None]
    assert normalized([None]) == [None] and read_scores("{" * 100_000, 1) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"endpoints": ("http://a/v1",)}, "expected an endpoint as MODEL@http"),
        ({"endpoints": ("a@file:" + "///b",)}, "expected an endpoint as MODEL@http"),
        ({"likelihoods": ("a", "a")}, "each judge has one voice, got one twice among a, a"),
        ({"attempts": 0}, "attempts must be positive, got 0"),
        ({"backoff_seconds": -1.0}, "backoff_seconds must not be negative, got -1.0"),
    ],
)
def test_mistakes_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        JuryConfig(**changes)


def test_a_key_that_is_none_is_told(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for name, message in (("none", "cannot be read"), ("empty", "must be a key of ASCII characters")):
        config = JuryConfig(endpoints=("a@http://b/v1",), api_key_file=str(tmp_path / name))
        with pytest.raises(ConfigError, match=message):
            make_jury(config, ComputeConfig(), MeshConfig())
