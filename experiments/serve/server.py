"""The HTTP server around the routes: connections that take too long are given up, and the end waits for what is under way."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from experiments.serve.app import Service
from lfm_jax.configuration import ConfigError

_MOST_CONNECTIONS = 1000
_MOST_HEAD_BYTES = 1 << 14


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve on. port: 0 takes one that is free.

    Raises:
      ConfigError: the address cannot be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"host, port: {host}:{port} cannot be had ({error.strerror}); port=0 takes a free one.") from error


def address(listening: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(service: Service) -> uvicorn.Server:
    """The server of a service. SIGTERM and SIGINT end it, after what is under way or `drain_seconds`; a second SIGINT at once."""
    limits = service.limits

    class Connection(_Connection):
        arrival_seconds, read_seconds = limits.arrival_seconds, limits.read_seconds

    config = uvicorn.Config(
        service.app, http=Connection, ws="none", loop="asyncio", lifespan="on", log_config=None, log_level="error",
        access_log=False, server_header=False, proxy_headers=False, limit_concurrency=_MOST_CONNECTIONS,
        h11_max_incomplete_event_size=_MOST_HEAD_BYTES, timeout_graceful_shutdown=limits.drain_seconds,
        timeout_keep_alive=limits.arrival_seconds,
    )  # fmt: skip
    return uvicorn.Server(config)


@contextlib.contextmanager
def serving(service: Service, listening: socket.socket) -> Iterator[str]:
    """Serves in a thread while it lasts; the URL."""
    server = make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    url = address(listening)
    thread.start()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join()


class _Connection(H11Protocol):
    """An HTTP connection that is closed where the other side takes too long to say what it wants, or to read what it is sent."""

    arrival_seconds: float
    read_seconds: float
    _arriving: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        else:
            self._arriving = _stopped(self._arriving)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading = _stopped(self._reading)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arriving, self._reading = _stopped(self._arriving), _stopped(self._reading)
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._arriving is None:
            self._arriving = self.loop.call_later(self.arrival_seconds, self.transport.abort)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
