"""Mutated requests to the server: is each answered as the client's mistake or its right, and the next good one as ever?"""

import collections
import copy
import dataclasses
import http.client
import json
import logging
import random
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from data_pipelines import Document, Tokenizer, TokenizerConfig, train_tokenizer
from experiments.benchmarks.outside_files import mutate
from experiments.results import write_results
from experiments.serve.chat import ChatFormat
from experiments.serve.requests import Limits
from experiments.serve.runner import Runner
from lfm_jax.generation import Engine, EngineConfig
from lfm_jax.models import ComputeConfig, ModelConfig

MODEL = ModelConfig(
    vocab_size=320, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
    context_length=256,
)  # fmt: skip
LIMITS = Limits(body_bytes=100_000, arrival_seconds=1.0, requests=4, answers=8, choices=4, prompt_characters=2000, new_tokens=64)
_WAIT_SECONDS = 120.0  # for an answer: the first of its kind is compiled
KEY = "fuzzing-key"
_COMPLETION, _CHAT = "/v1/completions", "/v1/chat/completions"
_GOOD = {"prompt": [1, 50, 60], "max_tokens": 2, "temperature": 0, "return_token_ids": True}
_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}}
_TEXT = "Be brief: the cat sat on the mat, and so did the other cats.\ndef f(x):\n    return [x + 1, 2.5, {'a': None}]\n\n"
_SAMPLES: tuple[tuple[str, dict[str, Any]], ...] = (
    (_COMPLETION, {"prompt": "def f(x):", "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "stop": ["\n", "return"]}),
    (_COMPLETION, {"prompt": [[1, 20, 30], [1, 40]], "max_tokens": 3, "n": 2, "logprobs": 2, "stream": True, "temperature": 0}),
    (_COMPLETION, {"prompt": ["a", "b"], "max_tokens": 2, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 7}),
    (
        _CHAT,
        {
            "messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "max_completion_tokens": 3, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
            "logprobs": True, "top_logprobs": 1, "tools": [_TOOL], "stop_loops": True, "return_token_ids": True, "n": 1,
        },
    ),
)  # fmt: skip
_HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 5e-324, "", "a", "\x00", "\ud800",
    "<|im_end|>", "\ufffd" * 50, "a" * 3000, "9", [], {}, [[]], [None], [0], [-1], [319], [320], [1] * 500, [[1]] * 500,
    ["x"] * 500, {"a": {}},
    [{"role": "user"}], [{"role": "tool", "content": None}], {"type": "json_schema", "schema": {"pattern": "(a+)+$"}},
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}, {"__proto__": {"x": 1}}, "{{ 1 / 0 }}", "../../etc",
)  # fmt: skip
_FIELDS = (
    "n", "best_of", "logit_bias", "echo", "suffix", "prompt_embeds", "chat_template", "chat_template_kwargs", "guided_regex",
    "response_format", "max_tokens", "max_completion_tokens", "stop", "seed", "logprobs", "top_logprobs", "tools", "tool_choice",
    "stream", "stream_options", "messages", "prompt", "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "n_discard",
)  # fmt: skip
# Within the bounds, at their ends.
_EXTREME: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 1e-5, 1, 100), "top_p": (1e-300, 1e-7, 0.5, 1), "top_k": (0, 1, 1_000_000), "min_p": (0, 1e-300, 1),
    "repetition_penalty": (0.01, 1, 100), "seed": (0, 2**32 - 1), "n": (1, 2), "stream": (True, False), "stop": ("\x00", "e"),
}  # fmt: skip
# What is done to requests; the first three twice as often.
KINDS = ("bytes", "value", "field", "bytes", "value", "field", "extreme", "large", "head", "length", "gone")
_METHODS = ("POST", "GET", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW", "HEAD")
_PATHS = ("/", "/health", "/v1/models", "/v1", "//", "/../etc", "/v1/completions/x", "/%00", "/?a=%ff", "*")
_LINES = (b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Upgrade: websocket", b"Host: elsewhere")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """requests: that are mutated. seed: of the mutations."""

    requests: int = 5000
    seed: int = 0

    def __post_init__(self):
        if self.requests < 1:
            raise ValueError(f"requests must be positive, got {self.requests}")


def small_model(folder: epath.Path, settings: EngineConfig) -> tuple[Engine, Tokenizer]:
    """An engine with random weights, and a tokenizer that is trained in `folder`, in a second."""
    import jax

    from experiments.stages import model_functions

    documents = [Document(_TEXT * 50, "")]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=MODEL.vocab_size), documents, folder / "tokenizer")
    functions = model_functions(MODEL, ComputeConfig(dtype="float32"))

    @jax.jit
    def initial():
        params, buffers = functions.init(jax.random.key(0))
        # Away from initialization, where a model merely repeats the last token.
        return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params), buffers

    params, buffers = initial()
    return Engine(functions, MODEL, params, buffers, settings, decode=tokenizer.decode), tokenizer


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(found for key, item in inside for found in _paths(item, (*path, key)))]


def _changed(draws: random.Random, body: dict[str, Any], kind: str) -> bytes:
    """A body with one or more hostile values in it."""
    body = copy.deepcopy(body)
    for _ in range(draws.choice((1, 1, 2, 3))):
        if kind == "field":
            body[draws.choice(_FIELDS)] = copy.deepcopy(draws.choice(_HOSTILE))
            continue
        paths = _paths(body)
        if not paths:
            break
        *above, last = draws.choice(paths)
        holder: Any = body
        for key in above:
            holder = holder[key]
        if draws.random() < 0.2:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(draws.choice(_HOSTILE))
    return json.dumps(body).encode()


def _large(draws: random.Random) -> bytes:
    deep = draws.choice((30, 40, 5000, 40_000))
    return draws.choice(
        (
            b'{"prompt": ' + b"[" * deep + b"]" * deep + b"}", b'{"a":' * deep + b"1" + b"}" * deep, b"[" * deep,
            b'{"prompt": "' + b"a" * draws.choice((2001, 99_000, 200_000)) + b'"}', b'{"' + b'\\"' * deep, b'""' * deep,
            b'{"prompt": [' + b"[1]," * deep + b"[1]]}", b'{"prompt": "a", "seed": ' + b"9" * deep + b"}",
            b'{"messages": [' + b'{"role":"user","content":"a"},' * min(deep, 3000) + b'{"role":"user","content":"a"}]}',
        )
    )  # fmt: skip


def _head(method: str, path: str, length: int | str) -> list[bytes]:
    lines = [
        f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", "Content-Type: application/json",
        f"Authorization: Bearer {KEY}", f"Content-Length: {length}",
    ]  # fmt: skip
    return [line.encode("latin-1") for line in lines]


def make_request(draws: random.Random, kind: str) -> bytes:
    """All bytes of a request that has been mutated. Of the kind "gone", a long answer is asked for, and not waited for."""
    path, body = draws.choice(_SAMPLES)
    if kind == "bytes":
        data = mutate(json.dumps(body).encode(), draws)[1]
    elif kind in ("value", "field"):
        data = _changed(draws, body, kind)
    elif kind == "extreme":
        some = draws.sample(sorted(_EXTREME), 4)
        data = json.dumps(body | {name: draws.choice(_EXTREME[name]) for name in some}).encode()
    elif kind == "large":
        data = _large(draws)
    else:
        long = {"stream": True, "max_completion_tokens" if path == _CHAT else "max_tokens": 60}
        data = json.dumps(body | long if kind == "gone" else body).encode()
    method, length = "POST", len(data)
    if kind == "length":
        length = draws.choice((0, len(data) // 2, len(data) + 100, -1, 10**30, "ten", ""))
    if kind == "head":
        method, path = draws.choice(_METHODS), draws.choice((path, *_PATHS))
    lines = _head(method, path, length)
    if kind == "head":
        for _ in range(draws.choice((0, 1, 2))):
            at = draws.randrange(len(lines))
            long = b"X: " + b"y" * draws.choice((9, 99_999))
            lines[at] = draws.choice((b"", mutate(lines[at] or b"a", draws)[1], lines[at] * 2, long))
        if draws.random() < 0.3:
            lines.append(draws.choice(_LINES))
    return b"\r\n".join(lines) + b"\r\n\r\n" + data


def send(port: int, data: bytes, parts: int | None = None) -> int | None:
    """The HTTP status that the bytes are answered with; None where the connection ends without one.

    parts: of the answer, after which the client leaves; None: it stays to the end.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=_WAIT_SECONDS) as connection:
        answer = b""
        try:
            connection.sendall(data)
            while (parts is None or parts > 0) and (part := connection.recv(1 << 16)):
                answer += part
                parts = None if parts is None else parts - 1
        except TimeoutError:
            return None
        except OSError:  # the server closed before it had read all, which takes what it said from what had not been read
            pass
    words = answer.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") else None


class Campaign:
    """Mutated requests in turns with a good one. port: of a server with the key of this file."""

    def __init__(self, port: int):
        self._port = port
        self._expected = self._good()
        self.rows: dict[str, collections.Counter[str]] = {}
        self.odd: list[dict[str, Any]] = []  # what should not have been

    def run(self, requests: int, seed: int, kinds: Sequence[str] = KINDS, progress: Callable[[range], Any] = iter) -> None:
        """Sends so many, of each kind in turn."""
        for number in progress(range(requests)):
            kind = kinds[number % len(kinds)]
            draws = random.Random(f"{seed} {number}")
            data = make_request(draws, kind)
            status = send(self._port, data, draws.randrange(3) if kind == "gone" else None)
            outcome = "left" if kind == "gone" else "unanswered" if status is None else f"{status // 100}xx"
            served = self._good() == self._expected
            leaked = not self._all_free()
            row = self.rows.setdefault(kind, collections.Counter())
            row.update({"requests": 1, outcome: 1, "next_good_served": served, "leaked": leaked})
            if outcome not in ("2xx", "4xx", "left") or not served or leaked:
                self.odd.append({"number": number, "kind": kind, "status": status, "request": data[:2000].decode("latin-1")})

    def _ask(self, method: str, path: str, content: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_WAIT_SECONDS)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request(method, path, None if content is None else json.dumps(content), headers)
        response = connection.getresponse()
        answer = response.status, json.loads(response.read())
        connection.close()
        return answer

    def _good(self) -> list[int] | None:
        status, answer = self._ask("POST", _COMPLETION, _GOOD)
        return answer["choices"][0]["token_ids"] if status == 200 else None

    def _all_free(self) -> bool:
        """Whether nobody holds a slot or a place; those who left may be noticed a moment later."""
        end = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < end:
            status, answer = self._ask("GET", "/health")
            if status == 200 and answer["answers"] == 0:
                return True
        return False


def main(config: Config, workdir: epath.Path) -> None:
    """Sends the requests to a server in this process, and writes what became of them, by what was done to them."""
    from rich.progress import track

    from experiments.serve.app import Service
    from experiments.serve.server import listen, serving

    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        engine, tokenizer = small_model(epath.Path(folder), EngineConfig(slots=4, steps=2, prefix_bytes=1 << 22))
        runner, chat = Runner(engine, LIMITS.answers), ChatFormat(tokenizer)
        service = Service("fuzzed", runner, tokenizer, chat, LIMITS, context=engine.context, key=KEY)
        listening = listen("127.0.0.1", 0)
        with serving(service, listening):
            campaign = Campaign(listening.getsockname()[1])
            campaign.run(config.requests, config.seed, progress=lambda numbers: track(numbers, description="asking"))
            slots = engine.active + engine.waiting
    rows = [{"kind": kind, **dict(row)} for kind, row in sorted(campaign.rows.items())]
    total = sum(campaign.rows.values(), collections.Counter())
    figures = {f"answered_{name}": total[name] for name in ("2xx", "4xx", "5xx")}
    figures |= {name: total[name] for name in ("requests", "unanswered", "left", "next_good_served", "leaked")}
    figures |= {"slots_held_at_the_end": slots, "seconds": time.monotonic() - begin, "rows": rows, "odd": campaign.odd}
    write_results(workdir, figures, config)
