"""The routes: who may ask, how much at a time, and the answers, whole or as they come."""

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import hmac
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from data_pipelines import Tokenizer
from experiments.serve.answers import Answers
from experiments.serve.chat import ChatFormat
from experiments.serve.requests import Limits, Reader, RequestError
from experiments.serve.runner import EngineFailed, Part, QueueFull, Runner

_LOG = logging.getLogger(__name__)
_PAGE = Path(__file__).with_name("page.html")
_OPEN = ("/", "/health")  # what is shown to those without the key: a page without content, and whether the server is there
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_READERS = 2  # bodies that are parsed, rendered and tokenised at a time
_AGAIN_SECONDS = "1"


class Service:
    """A model behind an API.

    Args:
      model: its name. context: tokens of a prompt and its answer. key: that clients must show; "": none.
    """

    def __init__(
        self, model: str, runner: Runner, tokenizer: Tokenizer, chat: ChatFormat, limits: Limits, *, context: int, key: str = "",
    ):  # fmt: skip
        self.model, self.runner, self.chat, self.limits, self.key = model, runner, chat, limits, key.encode()
        self.reader = Reader(model, tokenizer.vocab_size, context, limits)
        self.answered: collections.Counter[int] = collections.Counter()  # requests by HTTP status
        self._tokenizer, self._requests, self._created = tokenizer, 0, int(time.time())
        self._symbols = {index: symbol for symbol, index in chat.symbols.items()}
        self._pool = concurrent.futures.ThreadPoolExecutor(_READERS, "reader")

    @functools.cached_property
    def app(self) -> Starlette:
        """The ASGI application; the runner starts and ends with it."""
        routes = [
            Route("/", self._page), Route("/health", self._health), Route("/v1/models", self._models),
            Route("/v1/completions", _Endpoint(self, self._read_completion), methods=["POST"]),
            Route("/v1/chat/completions", _Endpoint(self, self._read_chat), methods=["POST"]),
        ]  # fmt: skip
        door, handlers = Middleware(_Door, self), {HTTPException: _http_error}
        return Starlette(routes=routes, middleware=[door], exception_handlers=handlers, lifespan=self._lifespan)

    def spell(self, token: int) -> str:
        """The text of a token, also of a symbol."""
        return self._symbols.get(token) or self._tokenizer.decode([token])

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """A request's place.

        Raises:
          RequestError: there is none now.
        """
        if self._requests >= self.limits.requests:
            raise _busy(f"{self._requests} requests are under way, at most {self.limits.requests} are taken; come again")
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def prepared(self, read: Callable[[bytes], Answers], body: bytes) -> Answers:
        """Parses, renders and tokenises in a thread, so that the others are answered meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, read, body)

    def _read_completion(self, body: bytes) -> Answers:
        asked = self.reader.completion(body)
        texts = [prompt for prompt in asked.prompts if isinstance(prompt, str)]
        encoded = iter(self._tokenizer.encode_batch(texts, threads=1) if texts else ())
        bos = self._tokenizer.bos_id
        prompts = [(bos, *next(encoded)) if isinstance(prompt, str) else prompt for prompt in asked.prompts]
        requests = self.reader.requests(asked, prompts, (self._tokenizer.eos_id,))
        return Answers(self.model, asked, requests, self.spell, chat=False)

    def _read_chat(self, body: bytes) -> Answers:
        asked = self.reader.chat(body)
        prompt = self.chat.prompt(asked.messages, asked.tools)
        return Answers(self.model, asked, self.reader.requests(asked, [prompt], self.chat.stop_ids), self.spell, chat=True)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.runner.start()
        try:
            yield
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self.runner.stop)

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(_PAGE.read_text(), headers={"content-security-policy": _POLICY})

    async def _health(self, _: Request) -> Response:
        alive = self.runner.alive
        load = {"requests": self._requests, "answers": self.runner.held}
        return JSONResponse({"status": "ok" if alive else "dead", **load}, 200 if alive else 503)

    async def _models(self, _: Request) -> Response:
        model = {"id": self.model, "object": "model", "created": self._created, "owned_by": "lfm_jax"}
        return JSONResponse({"object": "list", "data": [model]})


class _Door:
    """Asks everybody for the key, where there is one; counts what was answered."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._service.answered[message["status"]] += 1
            await send(message)

        refusal = self._refusal(Request(scope))
        await (_error(refusal) if refusal else self._app)(scope, receive, counted)

    def _refusal(self, request: Request) -> RequestError | None:
        key, host = self._service.key, request.headers.get("host", "")
        if not key:
            # A page from elsewhere whose name is made to lead here would pass for a page of ours.
            if host in _HOSTS or host.rpartition(":")[0] in _HOSTS:
                return None
            return RequestError("without a key this server is asked for by the name localhost alone", status=403)
        if request.scope["path"] in _OPEN:
            return None
        # Latin-1 is how headers are decoded.
        given = request.headers.get("authorization", "").encode("latin-1")
        if hmac.compare_digest(given, b"Bearer " + key):
            return None
        return RequestError("the key is missing or wrong; send Authorization: Bearer KEY", status=401, code="invalid_api_key")


class _Endpoint:
    """A route with generation behind it. read: body to answers, in a thread."""

    def __init__(self, service: Service, read: Callable[[bytes], Answers]):
        self._service, self._read, self._limits = service, read, service.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noticed(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            with self._service.admitted():
                request = Request(scope, receive)
                body = await self._body(request)
                await _while_there(receive, self._answer(body, noticed))
        except ClientDisconnect:
            return
        except (Exception, asyncio.CancelledError) as error:  # the second: the server ends, and has waited long enough
            failure = _told(error)
            if begun:  # the stream ends with it
                await send({"type": "http.response.body", "body": _event(_content(failure))})
            else:
                await _error(failure)(scope, receive, send)

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Which a page from elsewhere cannot send without asking.
            raise RequestError("the body must be JSON; send content-type: application/json", status=415)
        most, body = self._limits.body_bytes, bytearray()
        too_large = RequestError(f"the body has more than {most} bytes", status=413)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.arrival_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError as error:
            raise RequestError(f"the body has not come in {self._limits.arrival_seconds:g} seconds", status=408) from error
        return bytes(body)

    async def _answer(self, body: bytes, send: Send) -> None:
        service, loop = self._service, asyncio.get_running_loop()
        deadline = loop.time() + self._limits.seconds
        late = RequestError(f"there is no answer after {self._limits.seconds:g} seconds; come again", status=408)
        try:
            async with asyncio.timeout_at(deadline):
                answers = await service.prepared(self._read, body)
        except TimeoutError as error:
            raise late from error
        events: asyncio.Queue[list[Part] | Exception] = asyncio.Queue()
        deliver = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)
        ticket = service.runner.submit(answers.requests, deliver)
        try:
            parts = _parts(answers, events, deadline, late)
            if answers.stream:
                await _stream(answers, parts, send)
            else:
                async for _ in parts:
                    pass
                await _send_json(answers.whole(), send)
        finally:
            service.runner.cancel(ticket)


async def _parts(
    answers: Answers, events: asyncio.Queue[list[Part] | Exception], deadline: float, late: RequestError
) -> AsyncIterator[list[Part]]:
    """What comes until all choices have ended; at the deadline they are ended as they are."""
    while answers.open:
        try:
            async with asyncio.timeout_at(deadline):
                event = await events.get()
        except TimeoutError as error:
            if not answers.begun:
                raise late from error
            yield answers.cut()
            return
        if isinstance(event, Exception):
            raise event
        for part in event:
            answers.take(part)
        yield event


async def _stream(answers: Answers, parts: AsyncIterator[list[Part]], send: Send) -> None:
    """Server-sent events; the first only when the engine has begun, so that what fails before has an HTTP status."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
    begun = False
    async for some in parts:
        chunks = [chunk for part in some if (chunk := answers.chunk(part)) is not None]
        if not begun:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            chunks, begun = [*answers.opening(), *chunks], True
        if chunks:
            await send({"type": "http.response.body", "body": b"".join(map(_event, chunks)), "more_body": True})
            await asyncio.sleep(0)  # neither does `send` wait, and the client may have gone
    last = b"".join(map(_event, answers.closing())) + b"data: [DONE]\n\n"
    await send({"type": "http.response.body", "body": last})


async def _send_json(content: Any, send: Send) -> None:
    body = json.dumps(content, allow_nan=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _event(content: Any) -> bytes:
    return b"data: " + json.dumps(content, allow_nan=False).encode() + b"\n\n"


async def _while_there(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work; drops it when the client goes."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _busy(message: str) -> RequestError:
    return RequestError(message, status=429, code="rate_limit_exceeded")


def _told(error: BaseException) -> RequestError:
    """What the client is told of it: of what is not its own doing, no more than that."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFull):
        return _busy(str(error))
    if isinstance(error, EngineFailed):
        return RequestError(str(error), status=500)
    if isinstance(error, asyncio.CancelledError):
        return RequestError("the server ends; ask again", status=503)
    last = traceback.extract_tb(error.__traceback__)[-1]
    # Not its text, which may quote a prompt.
    _LOG.error("a request raised %s in %s, line %s", type(error).__name__, last.name, last.lineno)
    return RequestError("the server failed on this request", status=500)


def _content(error: RequestError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def _error(error: RequestError) -> Response:
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": _AGAIN_SECONDS}}.get(error.status, {})
    if error.status in (401, 403, 408, 413, 415, 429):
        headers = headers | {"connection": "close"}  # the rest of a body may be on its way, and nobody would read it
    # Not a JSONResponse, which cannot say half of a surrogate pair.
    return Response(json.dumps(_content(error)), error.status, headers, "application/json")


def _http_error(_: Request, error: HTTPException) -> Response:
    """Of the framework: no such route, or method."""
    return _error(RequestError(error.detail, status=error.status_code))
