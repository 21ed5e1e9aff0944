"""A seeded source of symbols whose every probability is known, and with it the least loss that any model can have on it.

Natural text has an entropy that nobody knows, so the constant E of a scaling law can only be believed. Here the next symbol is
drawn from a mixture: of a Zipf law, and, for each of several contexts, of a few favourites that a hash of the context picks.
Contexts of more symbols are more numerous, each rarer than the one before, so that there is always more to learn and to remember;
one context is the document's first symbol with the last, which no window of the latest symbols has.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Of a block: documents that grow together.
_BLOCK = 1 << 15
_LEVELS = 1 << 16  # in which the Zipf law is given, so that its probabilities are exact
_MOST_ORDER = 7  # symbols that fit into 64 bits, beside the tag of the context
_NONE = 0  # stands in a context where the document has not begun


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownEntropyConfig:
    """What the source is like.

    first_id, symbols: they are the ids from first_id to first_id + symbols - 1, below 256.
    zipf: exponent of the Zipf law, whose share of the mixture is what the others leave.
    order_weights: share of the favourites of the last symbol, of the last two, and so on.
    topic_weight: share of those of the first and the last symbol together.
    favourites: shares of a context's first, second, ... favourite; they add up to 1.
    end: probability that a document ends, after each of its symbols; longest: symbols after which it ends in any case.
    seed: of the hashes: which symbols are whose favourites.
    """

    first_id: int = 3
    symbols: int = 253
    zipf: float = 1.0
    order_weights: tuple[float, ...] = (0.2, 0.3, 0.2)
    topic_weight: float = 0.1
    favourites: tuple[float, ...] = (0.6, 0.3, 0.1)
    end: float = 1 / 16
    longest: int = 127
    seed: int = 0

    def __post_init__(self):
        if not (0 < self.first_id and 2 <= self.symbols and self.first_id + self.symbols <= 256):
            raise ValueError(f"ids must be in 1 to 255, two at least, got {self.symbols} from {self.first_id} on")
        if not 1 <= len(self.order_weights) <= _MOST_ORDER:
            raise ValueError(f"order_weights must be of 1 to {_MOST_ORDER} orders, got {len(self.order_weights)}")
        if min(*self.order_weights, self.topic_weight) < 0 or sum(self.order_weights) + self.topic_weight >= 1:
            raise ValueError(
                "order_weights and topic_weight must not be negative, and must leave a share to the Zipf law, got "
                f"{self.order_weights} and {self.topic_weight}"
            )
        if min(self.favourites, default=0) <= 0 or abs(sum(self.favourites) - 1) > 1e-9:
            raise ValueError(f"favourites must be above 0 and add up to 1, got {self.favourites}")
        if not 0 < self.end < 1 or self.longest < 1:
            raise ValueError(f"end must be in (0, 1) and longest at least 1, got {self.end} and {self.longest}")


class Certainty(NamedTuple):
    """What is known of each target of some documents: their symbols, and the end after them. In nats, [targets] float64.

    log_loss: -log p of what came. entropy: the mean of that over all that could have come.
    """

    log_loss: np.ndarray
    entropy: np.ndarray


class KnownEntropySource:
    """Documents of the source, and their exact probabilities."""

    def __init__(self, config: KnownEntropyConfig):
        """config: of what kind it is."""
        self.config = config
        shares = 1 / np.arange(1, config.symbols + 1) ** config.zipf
        ends = np.round(np.cumsum(shares / shares.sum()) * _LEVELS).astype(np.int64)
        if (np.diff(ends, prepend=0) < 1).any():
            raise ValueError(f"zipf={config.zipf}: the rarest of {config.symbols} symbols has less than 1 / {_LEVELS}; lower it")
        self._of_level = np.repeat(np.arange(config.symbols), np.diff(ends, prepend=0)).astype(np.uint64)
        self._zipf = np.diff(ends, prepend=0) / _LEVELS
        # The parts of the mixture, one for each favourite of each context; what is left is the Zipf law's.
        weights = (*config.order_weights, config.topic_weight)
        self._weights = np.array([weight * share for weight in weights for share in config.favourites])
        # Of each part the tag, and the mask of the latest symbols that its context is.
        self._tags = np.array([self._tag(part) for part in range(len(self._weights))], np.uint64)
        masks = [(1 << 8 * order) - 1 for order in range(1, len(config.order_weights) + 1)]
        self._masks = np.repeat(np.array([*masks, 0], np.uint64), len(config.favourites))

    def documents(self, seed: int, tokens: int) -> Iterator[np.ndarray]:
        """Documents, each [length] uint8 of ids, until they have that many symbols; the same for the same seed.

        Args:
          seed: documents of different seeds are independent draws.
          tokens: the last document is cut to it.
        """
        left, block = tokens, 0
        while left > 0:
            ids, lengths = self._block(np.random.default_rng([self.config.seed, seed, block]))
            for row, length in zip(ids, np.minimum(lengths, self.config.longest).tolist(), strict=True):
                length = min(length, left)
                yield row[:length]
                left -= length
                if not left:
                    return
            block += 1

    def certainty(self, documents: list[np.ndarray]) -> Certainty:
        """Log-loss and entropy of each target of these documents, one after the other: what no model can do better than.

        A model knows less in one place: it does not see that the longest documents must end.
        """
        found = [self._certainty_of(document) for document in documents]
        return Certainty(*(np.concatenate(each) for each in zip(*found, strict=True)))

    def probabilities(self, document: np.ndarray) -> np.ndarray:
        """[length + 1, symbols]: of each symbol before, in and after a document, given that it does not end there."""
        history, first = self._contexts(document)
        keys = self._keys(history[:, None], first[:, None], self._masks)
        favourites = self._favourite(keys, self._tags).astype(np.int64)
        found = np.tile(self._zipf * (1 - self._weights.sum()), (len(history), 1))
        places = np.arange(len(history))
        for part, weight in enumerate(self._weights):
            found[places, favourites[:, part]] += weight
        return found

    def _certainty_of(self, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        config, length = self.config, len(document)
        found = self.probabilities(document)
        # Before the first symbol it cannot end; after the longest it must.
        ends = np.full(length + 1, config.end)
        ends[0], ends[config.longest :] = 0, 1
        came = np.append(found[np.arange(length), document.astype(np.int64) - config.first_id] * (1 - ends[:-1]), ends[-1])
        by_chance = (ends > 0) & (ends < 1)
        entropy = -(found * np.log(found)).sum(axis=1) * (1 - ends) + np.where(by_chance, _binary_entropy(config.end), 0)
        return -np.log(came), entropy

    def _contexts(self, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At each place, [length + 1], the latest symbols in one number, the last in its lowest byte, and the first symbol."""
        wide = document.astype(np.uint64)
        history = np.zeros(len(wide) + 1, np.uint64)
        for back in range(min(len(wide), len(self.config.order_weights))):
            history[back + 1 :] |= wide[: len(wide) - back] << np.uint64(8 * back)
        first = np.full(len(history), wide[0])
        first[0] = _NONE
        return history, first

    def _keys(self, history: np.ndarray, first: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """The context of each part of the mixture; where its mask is 0, it is the first and the last symbol."""
        return np.where(masks > 0, history & masks, first << np.uint64(8) | history & np.uint64(255))

    def _block(self, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ids [documents, longest] and lengths, in an order by chance; they grow together, one symbol at a time."""
        config = self.config
        lengths = np.minimum(draws.geometric(config.end, _BLOCK), config.longest)
        by_length = np.argsort(-lengths, kind="stable")
        ids = np.zeros((int(lengths.max()), _BLOCK), np.uint8)
        history, first = np.zeros(_BLOCK, np.uint64), np.zeros(_BLOCK, np.uint64)
        for place in range(len(ids)):
            growing = int((lengths > place).sum())
            drawn = self._draw(draws.integers(0, 1 << 64, growing, np.uint64), history[:growing], first[:growing])
            ids[place, :growing] = drawn
            history[:growing] = history[:growing] << np.uint64(8) | drawn
            if not place:
                first[:] = drawn
        in_order = np.empty((_BLOCK, len(ids)), np.uint8)
        in_order[by_length] = ids.T
        return in_order, lengths

    def _draw(self, random: np.ndarray, history: np.ndarray, first: np.ndarray) -> np.ndarray:
        """The next ids [documents]: the high bits of a random number choose the part, the low ones a symbol by the Zipf law."""
        chosen = np.searchsorted(self._thresholds, random >> np.uint64(16), side="right")
        by_zipf = chosen == len(self._weights)
        part = np.where(by_zipf, 0, chosen)
        favourite = self._favourite(self._keys(history, first, self._masks[part]), self._tags[part])
        drawn = np.where(by_zipf, self._of_level[random & np.uint64(_LEVELS - 1)], favourite)
        return drawn + np.uint64(self.config.first_id)

    @functools.cached_property
    def _thresholds(self) -> np.ndarray:
        return np.round(np.cumsum(self._weights) * (1 << 48)).astype(np.uint64)

    def _favourite(self, keys: np.ndarray, tags: np.ndarray) -> np.ndarray:
        """Symbols, counted from 0, that are the favourites of contexts; often used ones are so more often."""
        return self._of_level[_mixed(keys ^ tags) >> np.uint64(48)]

    def _tag(self, part: int) -> int:
        return int(_mixed(np.array([self.config.seed << 16 | part + 1], np.uint64))[0])


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): every bit of a uint64 changes about half of the others."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _binary_entropy(share: float) -> float:
    return float(-share * np.log(share) - (1 - share) * np.log1p(-share))
