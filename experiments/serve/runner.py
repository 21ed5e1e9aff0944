"""The engine's own thread: it takes requests from other threads and tells them what is new, whatever becomes of one of them."""

import functools
import logging
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lfm_jax.generation import Engine, Request, Update

_STEP_SECONDS = 60.0  # a step takes milliseconds, and much longer where it is compiled first
_LOG = logging.getLogger(__name__)


class Part(NamedTuple):
    """What is new of an answer. index: of its request in the ticket.

    cached: tokens of the prompt that are not read again; None where that is not known: the request waited for a slot.
    """

    index: int
    update: Update
    cached: int | None


class QueueFull(Exception):
    """So many answers are under way or waiting that no more are taken now."""


class EngineFailed(Exception):
    """The engine raised while it worked on this request, or ends."""


Deliver = Callable[[list[Part] | Exception], None]


class Ticket:
    """Some requests that were handed over together.

    deliver: is told, in the engine's thread, of their parts or why there will be no more.
    """

    def __init__(self, requests: Sequence[Request], deliver: Deliver):
        self.requests, self.deliver = tuple(requests), deliver
        self.cached: list[int | None] = []
        self.numbers: dict[int, int] = {}  # of the engine, of those that have not ended: index


class Runner:
    """Has an engine to itself, from `start` to `stop`.

    Args:
      most: answers that are under way or waiting.
    """

    def __init__(self, engine: Engine, most: int):
        self._engine, self._most = engine, most
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by the engine's number
        self._lock, self._held = threading.Lock(), 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.tokens = 0  # of all answers

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    @property
    def held(self) -> int:
        """Answers under way or waiting."""
        return self._held

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Gives up what is under way and ends the thread; one that is stuck is left behind, and ends with the process."""
        self._inbox.put(None)
        self._thread.join(_STEP_SECONDS)

    def submit(self, requests: Sequence[Request], deliver: Deliver) -> Ticket:
        """Hands requests over, all or none.

        Raises:
          QueueFull: too many answers are under way.
        """
        with self._lock:
            if self._held + len(requests) > self._most:
                raise QueueFull(f"{self._held} answers are under way or waiting, at most {self._most} are taken; come again")
            self._held += len(requests)
        ticket = Ticket(requests, deliver)
        self._inbox.put(functools.partial(self._begin, ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Frees what a ticket still holds; nothing is delivered from the engine's next look on."""
        self._inbox.put(functools.partial(self._drop, ticket))

    def _run(self) -> None:
        while True:
            try:
                while not self._tickets or not self._inbox.empty():
                    command = self._inbox.get()
                    if command is None:
                        self._give_up(EngineFailed("the server ends"))
                        return
                    command()
                self._step()
            except Exception as error:  # of whatever request: the others after it are answered
                last = traceback.extract_tb(error.__traceback__)[-1]
                # Not its text, which may quote a prompt.
                _LOG.error("the engine raised %s in %s, line %s", type(error).__name__, last.name, last.lineno)
                self._give_up(EngineFailed("the engine failed on this request"))

    def _begin(self, ticket: Ticket) -> None:
        engine = self._engine
        for index, request in enumerate(ticket.requests):
            free = engine.waiting + engine.active < engine.settings.slots  # it will be read before any other is kept
            found = engine.prefixes.longest(request.prompt) if free else None
            try:
                number = engine.submit(request)
            except ValueError as error:
                self._release(len(ticket.requests) - index)
                self._drop(ticket)
                self._deliver(ticket, error)
                return
            ticket.cached.append((found[0] if found else 0) if free else None)
            ticket.numbers[number] = index
            self._tickets[number] = ticket

    def _step(self) -> None:
        parts: dict[Ticket, list[Part]] = {}
        for update in self._engine.step():
            ticket = self._tickets.get(update.request)
            if ticket is None:  # it was cancelled
                continue
            index = ticket.numbers[update.request]
            parts.setdefault(ticket, []).append(Part(index, update, ticket.cached[index]))
            self.tokens += len(update.tokens)
            if update.finish_reason is not None:
                del self._tickets[update.request], ticket.numbers[update.request]
                self._release(1)
        for ticket, some in parts.items():
            self._deliver(ticket, some)

    def _drop(self, ticket: Ticket) -> None:
        for number in ticket.numbers:
            self._engine.cancel(number)
            del self._tickets[number]
        self._release(len(ticket.numbers))
        ticket.numbers.clear()

    def _give_up(self, error: Exception) -> None:
        for ticket in set(self._tickets.values()):
            self._drop(ticket)
            self._deliver(ticket, error)

    def _release(self, count: int) -> None:
        with self._lock:
            self._held -= count

    def _deliver(self, ticket: Ticket, event: list[Part] | Exception) -> None:
        try:
            ticket.deliver(event)
        except RuntimeError:  # the loop that waited for it has ended
            self._drop(ticket)
