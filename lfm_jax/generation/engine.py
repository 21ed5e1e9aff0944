"""Many requests answered together: they wait, their prompts are read, they take slots, and all slots advance in one loop."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from lfm_jax.generation import slots as device
from lfm_jax.generation.prefixes import Known, Prefixes
from lfm_jax.generation.requests import Answer, Completion, Request, Update, cancelled, joined
from lfm_jax.generation.sampling import needs_of, settings_of
from lfm_jax.generation.weights import quantize_weights
from lfm_jax.models import DecoderCache, FunctionalModel, ModelConfig
from lfm_jax.models.functional import Tree

Weights = Literal["float", "int8"]
MOST_TOP_LOG_PROBS = 20
_LEAST_CAPACITY, _LEAST_CALL = 64, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine takes on.

    slots: requests that are answered at a time; the others wait.
    context: tokens of a prompt and its answer together. None: the model's context_length.
    prefill_chunk: tokens of a prompt that one call reads; longer ones take several. prefill_rows: prompts in a call.
    steps: tokens of each request between two looks at who waits and which texts have ended.
    prefix_bytes: of memory for prompts and answers that later prompts may go on from; 0: none are kept.
    weights: matrices in the type that they are computed with, or rounded to eight bits (`lfm_jax.generation.weights`).
    tell_routing: of a mixture of experts, it is told which experts each token went to (`Completion.routing`).
    """

    slots: int = 64
    context: int | None = None
    prefill_chunk: int = 256
    prefill_rows: int = 16
    steps: int = 16
    prefix_bytes: int = 0
    weights: Weights = "float"
    tell_routing: bool = False

    def __post_init__(self):
        for field in ("slots", "prefill_chunk", "prefill_rows", "steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {self.weights!r}")
        if self.context is not None and self.context < 2:
            raise ValueError(f"context must have room for a prompt and an answer, got {self.context}")
        if self.prefix_bytes < 0:
            raise ValueError(f"prefix_bytes must not be negative, got {self.prefix_bytes}")


class _Read(NamedTuple):
    """Where the state of a prompt is: a row of some that were read together. routing: of its tokens, if it is told."""

    rows: device.Rows
    row: int
    routing: np.ndarray | None


class Engine:
    """Answers requests by one model. Not for several threads at once.

    What an answer is depends on its request alone: other requests, slots that were used before, and when it came change nothing
    but the last bits of its log-probabilities.

    Args:
      functions, config, params, buffers: the model; of the parameters a copy is kept in the types that they are computed with.
      decode: token ids to text; without it there are no texts, and no stop strings.
      mesh: that the parameters are sharded over; None: whatever devices they are on.
    Raises:
      ValueError: the settings ask for the routing of a model that has none.
    """

    def __init__(
        self,
        functions: FunctionalModel,
        config: ModelConfig,
        params: Tree,
        buffers: Tree,
        settings: EngineConfig = EngineConfig(),
        *,
        decode: Callable[[Sequence[int]], str] | None = None,
        mesh: Mesh | None = None,
    ):
        if settings.tell_routing and config.routing_shape is None:
            raise ValueError("tell_routing is for mixtures of experts, and no block of this model is one; leave it out")
        self.settings, self.config = settings, config
        self.context = settings.context or config.context_length
        dtype = functions.compute_dtypes["embed"]["embedding"]
        chunk = min(settings.prefill_chunk, self.context)
        self._program = device.Program(functions, config, dtype, chunk, settings.tell_routing)
        self._mesh, self._decode = mesh, decode
        prepare = functions.cast if settings.weights == "float" else functools.partial(quantize_weights, functions)
        # What jit returns is a copy, even of what it passes through: a training step takes over the caller's own arrays.
        self._prepare = jax.jit(lambda params, buffers: (prepare(params), buffers))
        with self._on_mesh():
            self._model = self._prepare(params, buffers)
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._read: dict[tuple[int, ...], _Read] = {}  # prompts that more requests wait with
        self._slots: device.Slots | None = None
        self._answers: list[Answer | None] = []  # by slot
        self._ended: list[Update] = []  # of requests that were cancelled before they had a slot
        self._numbers = 0
        self.prefixes = Prefixes(config, settings.prefix_bytes)
        self.prompt_tokens_read = 0  # by the model; what was kept of earlier requests is not read again

    def load(self, params: Tree, buffers: Tree) -> None:
        """Answers by these from now on; they are copied, as the first ones were, and placed as those are.

        Nothing is compiled anew. What had been read under the old ones is forgotten.

        Raises:
          ValueError: requests are being answered, or wait.
        """
        if self.active or self.waiting:
            raise ValueError(
                f"{self.active} requests are being answered and {self.waiting} wait; an answer is by one model: let them end, or "
                "cancel them, before new weights are loaded"
            )
        with self._on_mesh():
            loaded = self._prepare(params, buffers)
        place = lambda new, old: new if new.sharding == old.sharding else jax.device_put(new, old.sharding)
        self._model = jax.tree.map(place, loaded, self._model)
        self._read = {}
        self.prefixes = Prefixes(self.config, self.settings.prefix_bytes)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests in slots."""
        return sum(answer is not None for answer in self._answers)

    def submit(self, request: Request) -> int:
        """Puts a request at the end of the queue; returns its number.

        Raises:
          ValueError: it cannot be answered; the text says why.
        """
        self._check(request)
        self._numbers += 1
        self._waiting.append((self._numbers, request))
        return self._numbers

    def cancel(self, number: int) -> None:
        """Ends a request; nothing happens where it has ended. Its last update comes with the next step."""
        for answer in self._answers:
            if answer is not None and answer.number == number:
                self._answers[self._answers.index(answer)] = None
                self._ended.append(cancelled(number))
        for item in [item for item in self._waiting if item[0] == number]:
            self._waiting.remove(item)
            self._ended.append(cancelled(number))

    def step(self) -> list[Update]:
        """Lets waiting requests in and advances all; returns what is new, nothing where nobody asked for anything."""
        with self._on_mesh():
            updates = [*self._admit(), *self._advance()]
        updates, self._ended = [*self._ended, *updates], []
        return updates

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers all requests; those that were submitted before are answered along the way, and their updates are lost.

        Raises:
          ValueError: one of them cannot be answered; none is, then.
        """
        for request in requests:
            self._check(request)
        parts: dict[int, list[Update]] = {self.submit(request): [] for request in requests}
        missing = set(parts)
        while missing:
            for update in self.step():
                if update.request in parts:
                    parts[update.request].append(update)
                if update.finish_reason is not None:
                    missing.discard(update.request)
        return [joined(updates) for updates in parts.values()]

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _check(self, request: Request) -> None:
        prompt, limit = request.prompt, request.sampling.max_new_tokens
        if not prompt:
            raise ValueError("a prompt needs at least one token; start with the beginning-of-text token")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise ValueError(
                f"prompt ids must be in 0..{self.config.vocab_size - 1}, got {min(prompt)}..{max(prompt)}; is it this tokenizer?"
            )
        if len(prompt) + limit > self.context:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and an answer of up to {limit} do not fit into a context of {self.context}"
            )
        if request.stop_strings and self._decode is None:
            raise ValueError("stop strings need an engine with a tokenizer (decode)")
        if not all(request.stop_strings):
            raise ValueError("a stop string is empty; every text contains it")
        if request.drawn and request.sampling.repetition_penalty != 1:
            raise ValueError(
                f"drawn tells a trainer what it must compute again, which knows no repetition_penalty, got "
                f"{request.sampling.repetition_penalty}; set it to 1"
            )
        most = min(MOST_TOP_LOG_PROBS, self._program.known)
        if not 0 <= request.top_log_probs <= most:
            raise ValueError(f"top_log_probs must be in 0..{most}, got {request.top_log_probs}")

    def _admit(self) -> list[Update]:
        """Requests from the queue into the slots that are free."""
        room = self.settings.slots - self.active
        entering = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if not entering:
            return []
        fresh = dict.fromkeys(request.prompt for _, request in entering if request.prompt not in self._read)
        self._read |= self._prefill(list(fresh))
        self._make_room([request for _, request in entering])
        free = (index for index, answer in enumerate(self._answers) if answer is None)
        groups: dict[int, list[tuple[int, int, Request]]] = {}
        for number, request in entering:
            groups.setdefault(id(self._read[request.prompt].rows), []).append((next(free), number, request))
        updates = [update for group in groups.values() for update in self._insert(group)]
        wanted = {request.prompt for _, request in self._waiting}
        self._read = {prompt: read for prompt, read in self._read.items() if prompt in wanted}
        return updates

    def _prefill(self, prompts: list[tuple[int, ...]]) -> dict[tuple[int, ...], _Read]:
        """Reads prompts, those together that are about as long."""
        known = {prompt: self.prefixes.longest(prompt) for prompt in prompts}
        rest = {prompt: len(prompt) - (known[prompt].length if known[prompt] else 0) for prompt in prompts}
        size = lambda prompt: (_bucket(len(prompt), _LEAST_CAPACITY), _bucket(rest[prompt], _LEAST_CALL))
        groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for prompt in prompts:
            groups.setdefault(size(prompt), []).append(prompt)
        read = {}
        for (capacity, longest), group in sorted(groups.items()):
            for start in range(0, len(group), self.settings.prefill_rows):
                some = group[start : start + self.settings.prefill_rows]
                found = self._read_together(some, [known[prompt] for prompt in some], min(capacity, self.context), longest)
                read |= dict(zip(some, found, strict=True))
        return read

    def _read_together(
        self, prompts: list[tuple[int, ...]], known: list[Known | None], capacity: int, longest: int
    ) -> list[_Read]:
        rows = device.empty_rows(self._program, _bucket(len(prompts), 1), capacity)
        for row, found in enumerate(known):
            if found is not None:
                cache = device.put_rows(rows.cache, found.cache, np.zeros(1, np.int32), np.array([row], np.int32))
                rows = rows._replace(cache=cache)
        starts = [0 if found is None else found.length for found in known]
        call = min(longest, self._program.chunk)
        rest = max(len(prompt) - start for prompt, start in zip(prompts, starts, strict=True))
        told = []
        for begin in range(0, rest, call):
            tokens = np.zeros((_bucket(len(prompts), 1), call), np.int32)
            segment_ids = np.zeros_like(tokens)
            for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
                part = prompt[start + begin : start + begin + call]
                tokens[row, : len(part)] = part
                segment_ids[row, : len(part)] = 1
            rows, routing = device.prefill(self._program, *self._model, rows, tokens, segment_ids)
            told.append(routing)
            self.prompt_tokens_read += int(segment_ids.sum())
        routings = [None] * len(prompts)
        if self.settings.tell_routing:
            new = np.concatenate([np.asarray(routing) for routing in told], axis=1)
            for row, (prompt, found, start) in enumerate(zip(prompts, known, starts, strict=True)):
                before = [] if found is None else [found.routing]
                routings[row] = np.concatenate([*before, new[row, : len(prompt) - start]])
        if self.settings.prefix_bytes:
            for row, prompt in enumerate(prompts):
                self._keep(prompt, rows.cache, row, routings[row])
        return [_Read(rows, row, routing) for row, routing in enumerate(routings)]

    def _make_room(self, requests: list[Request]) -> None:
        """As many slots, each of a size, as these requests need beside those that are being answered.

        Both grow by doubling, so that few programs are compiled, and start anew where nobody is in a slot.
        """
        penalty = any(request.sampling.repetition_penalty != 1 for request in requests)
        stop_ids = max(len(request.stop_ids) for request in requests)
        capacity = max(_room(request, request.sampling.max_new_tokens) for request in requests)
        old, taken = self._slots, [index for index, answer in enumerate(self._answers) if answer is not None]
        if old is None or not taken:
            old = None
        else:
            penalty = penalty or old.seen is not None
            stop_ids = max(stop_ids, old.stop_ids.shape[1])
            capacity = max(capacity, self._capacity)
        count = min(_bucket(len(taken) + len(requests), 1), self.settings.slots)
        count = max(count, len(self._answers) if taken else 0)
        capacity, stop_ids = min(_bucket(capacity, _LEAST_CAPACITY), self.context), _bucket(max(stop_ids, 1), 1)
        wanted = (count, capacity, stop_ids, penalty)
        if old is not None and wanted == (len(self._answers), self._capacity, old.stop_ids.shape[1], old.seen is not None):
            return
        new = device.empty_slots(self._program, *wanted)
        if old is not None:
            if new.seen is not None and old.seen is None:
                old = old._replace(seen=np.zeros((len(self._answers), self.config.vocab_size), bool))
            everyone = np.arange(len(self._answers), dtype=np.int32)
            new = device.put_rows(new, old, everyone, everyone)
        self._slots, self._capacity = new, capacity
        self._answers = (self._answers if taken else []) + [None] * (count - (len(self._answers) if taken else 0))

    def _insert(self, group: list[tuple[int, int, Request]]) -> list[Update]:
        """(slot, number, request) of those whose prompts were read together take their slots and get their first tokens."""
        requests = [request for _, _, request in group]
        padding = _bucket(len(group), 1) - len(group)
        padded = requests + requests[-1:] * padding
        seen = None
        if self._slots.seen is not None:
            seen = np.zeros((len(padded), self.config.vocab_size), bool)
            for row, request in enumerate(padded):
                seen[row, list(request.prompt)] = True
        stop_ids = np.full((len(padded), self._slots.stop_ids.shape[1]), -1, np.int32)
        for row, request in enumerate(padded):
            stop_ids[row, : len(request.stop_ids)] = request.stop_ids
        entry = device.Entry(
            settings=settings_of([request.sampling for request in padded]),
            left=np.array([request.sampling.max_new_tokens for request in padded], np.int32), stop_ids=stop_ids, seen=seen,
        )  # fmt: skip
        source = np.array([self._read[request.prompt].row for request in padded], np.int32)
        target = np.array([slot for slot, _, _ in group] + [len(self._answers)] * padding, np.int32)
        rows = self._read[requests[0].prompt].rows
        self._slots, chosen = device.insert(
            self._program, *self._model, self._slots, rows, source, target, entry,
            needs=needs_of([request.sampling for request in requests]), top=_top(requests, self._program.known),
            tell=_tell(requests),
        )  # fmt: skip
        chosen, updates = jax.tree.map(lambda array: np.asarray(array)[None], chosen), []
        for row, (slot, number, request) in enumerate(group):
            self._answers[slot] = Answer(number, request, self._decode, self._read[request.prompt].routing)
            updates.append(self._told(slot, jax.tree.map(lambda array, row=row: array[:, row], chosen)))
        return updates

    def _advance(self) -> list[Update]:
        """Up to `steps` tokens of each answer."""
        answers = [answer for answer in self._answers if answer is not None]
        if not answers:
            return []
        requests = [answer.request for answer in answers]
        keep = np.array([answer is not None for answer in self._answers])
        longest = max(_room(answer.request, len(answer.tokens) + self.settings.steps) for answer in answers)
        self._slots, chosen = device.decode(
            self._program, *self._model, self._slots, keep, np.bool_(bool(self._waiting)), steps=self.settings.steps,
            reach=min(_bucket(longest, _LEAST_CAPACITY), self._capacity),
            needs=needs_of([request.sampling for request in requests]), top=_top(requests, self._program.known),
            tell=_tell(requests),
        )  # fmt: skip
        chosen = jax.tree.map(np.asarray, chosen)
        return [
            self._told(slot, jax.tree.map(lambda array, slot=slot: array[:, slot], chosen))
            for slot, answer in enumerate(self._answers)
            if answer is not None
        ]

    def _told(self, slot: int, chosen: device.Chosen) -> Update:
        answer = self._answers[slot]
        update = answer.take(chosen)
        if update.finish_reason is not None:
            self._answers[slot] = None
            # Of the last token the model has not been told; those behind a stop string it has.
            last = [int(token) for token in chosen.tokens if token >= 0]
            read = [*answer.request.prompt, *answer.tokens[: len(answer.tokens) - len(update.tokens)], *last][:-1]
            if self.settings.prefix_bytes:
                routing = np.concatenate(answer.routing) if answer.routing else None
                self._keep(read, self._slots.cache, slot, routing)
        return update

    def _keep(self, tokens: Sequence[int], cache: DecoderCache, row: int, routing: np.ndarray | None) -> None:
        capacity = min(_bucket(len(tokens), _LEAST_CAPACITY), self.context)
        self.prefixes.keep(tokens, device.take_row(self._program, cache, np.int32(row), capacity), routing)


def _room(request: Request, tokens: int) -> int:
    """For a prompt and as many tokens of its answer, of which the last is not in the cache."""
    return len(request.prompt) + min(tokens, request.sampling.max_new_tokens) - 1


def _bucket(number: int, least: int) -> int:
    """The next power of two: every size has programs of its own, so that there should be few."""
    return max(least, 1 << (number - 1).bit_length())


def _top(requests: Sequence[Request], known: int) -> int:
    """One of two sizes, for the same reason."""
    return min(MOST_TOP_LOG_PROBS, known) if any(request.top_log_probs for request in requests) else 0


def _tell(requests: Sequence[Request]) -> device.Tell:
    drawn = [request.sampling for request in requests if request.drawn]
    return device.Tell(drawn=bool(drawn), kept=any(sampling.truncates for sampling in drawn))
