"""Conversations as ids, and which of these a model is trained to say."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_pipelines.conversations.chat_formats import END, Template
from data_pipelines.conversations.reading import Conversation
from data_pipelines.conversations.turns import Turns, render_prompts, render_turns
from data_pipelines.sources.quarantine import Quarantine
from data_pipelines.sources.records import BadRecord
from data_pipelines.tokenization.tokenizer import SYMBOLS, Tokenizer

# Conversations that are rendered and encoded together, at most, and from how many rendered characters on there are fewer.
_TOGETHER = 512
_TOGETHER_CHARACTERS = 1 << 24
_SHOWN_CHARACTERS = 1000


class Examples:
    """Texts as ids, each with one beginning-of-text symbol, in memory: 5 bytes an id. Can be pickled.

    conversations: of how many they are; refused: how many the template has refused. tokenizer: the fingerprint of the one that
    made the ids. fingerprint: of it all.
    """

    def __init__(self, examples: Iterable[tuple[np.ndarray, np.ndarray]], *, conversations: int, refused: int, tokenizer: str):
        """examples: (ids, which are trained), [length] each, of one or more ids."""
        ids, trained = zip(*examples, strict=True)
        self._ids = np.concatenate(ids).astype(np.int32)
        self._trained = np.concatenate(trained).astype(bool)
        self._ends = np.cumsum([len(each) for each in ids])
        self.conversations, self.refused, self.tokenizer = conversations, refused, tokenizer
        digest = hashlib.sha256(tokenizer.encode())
        for array in (self._ids.astype("<i4"), self._trained, self._ends.astype("<i8")):
            digest.update(np.ascontiguousarray(array))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        """The number of texts."""
        return len(self._ends)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, [length] int32, and which of them are trained, [length] bool."""
        here = slice(int(self._ends[number - 1]) if number else 0, int(self._ends[number]))
        return self._ids[here], self._trained[here]

    @property
    def lengths(self) -> np.ndarray:
        """[texts] int64, ids of each."""
        return np.diff(self._ends, prepend=0)

    @property
    def trained_tokens(self) -> int:
        """How many ids are trained, in all."""
        return int(self._trained.sum())


class ConversationEncoder:
    """From conversations to ids, for one tokenizer and one template. Can be pickled if the template can.

    A symbol (`<|im_end|>`, ...) is one where the template writes it; what messages spell is text, but for the symbols around a
    call in an assistant's content. The text between symbols is encoded as it would be in one piece with them, for they part what
    a tokenizer joins; besides, every answer, also an earlier one of a prompt, is encoded by itself: a model that speaks begins
    with a token of its own, even where the tokenizer would join the answer's first line break to that before it. So the ids of a
    prompt are those before its answer.

    symbols: spelling of each symbol that the tokenizer has: its id.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template):
        self._tokenizer, self._template = tokenizer, template
        self.symbols = symbol_ids(tokenizer)
        self._pattern = re.compile("(" + "|".join(map(re.escape, self.symbols)) + ")")

    def prompts(self, conversations: Sequence[Conversation]) -> list[np.ndarray]:
        """The ids of each up to where the assistant begins to speak, [length] int32.

        Raises:
          ValueError: the template refuses one.
        """
        found = self.each_prompt(conversations)
        for conversation, ids in zip(conversations, found, strict=True):
            if isinstance(ids, ValueError):
                raise ValueError(f"{conversation.name}: {ids}") from ids
        return found

    def each_prompt(self, conversations: Sequence[Conversation]) -> list[np.ndarray | ValueError]:
        """As `prompts`, or why the template makes none of it; it is called once for all, which for Jinja is a process."""
        turns = render_prompts(conversations, self._template)
        encoded = iter(self._encode([each for each in turns if not isinstance(each, ValueError)]))
        return [each if isinstance(each, ValueError) else next(encoded)[0] for each in turns]

    def examples(self, conversations: Sequence[Conversation]) -> list[list[tuple[np.ndarray, np.ndarray]] | ValueError]:
        """The texts of each (see `render_turns`) as ids and which of them are trained; or why the template makes none of it.

        What stands behind the symbol that ends an answer is not trained: the model has stopped by then. What stands behind the
        last answer is left out.

        Raises:
          ValueError: as `render_turns`; or nothing of a conversation would be trained.
        """
        rendered = render_turns(conversations, self._template)
        turns = [[self._to_the_end(each) for each in found] if isinstance(found, list) else found for found in rendered]
        encoded = iter(self._encode([each for found in turns if isinstance(found, list) for each in found]))
        found = [list(itertools.islice(encoded, len(each))) if isinstance(each, list) else each for each in turns]
        for conversation, texts, examples in zip(conversations, turns, found, strict=True):
            if isinstance(examples, list) and not (examples and all(trained.any() for _, trained in examples)):
                text = texts[-1].plain() if texts else str(conversation.messages)
                raise ValueError(
                    f"{conversation.name}: nothing of it is an answer by {self._template.name}, so there is nothing to learn; "
                    f"repair the template or remove the record: {text[:_SHOWN_CHARACTERS]!r}"
                )
        return found

    def _to_the_end(self, turns: Turns) -> Turns:
        """Without the space behind the symbols that end answers, and what is behind the last."""
        spans = []
        for first, end in turns.spans:
            *_, last = itertools.chain([None], self._pattern.finditer(turns.text, first, end))
            spans.append((first, last.end() if last and not turns.text[last.end() : end].strip() else end))
        return turns._replace(text=turns.text[: spans[-1][1]], spans=tuple(spans))

    def _encode(self, turns: Sequence[Turns]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and which of them are trained, of each; the tokenizer is called once."""
        pieces = [list(self._pieces(each)) for each in turns]
        texts = [piece for of_one in pieces for piece, symbol, _ in of_one if symbol is None]
        encoded = iter(self._tokenizer.encode_batch(texts))
        found, bos = [], self._tokenizer.bos_id
        for of_one in pieces:
            ids, trained = [bos], [False]  # exactly one, whether the template has none, or one in each turn
            for _, symbol, counts in of_one:
                new = next(encoded) if symbol is None else [symbol]
                if new != [bos]:
                    ids += new
                    trained += [counts] * len(new)
            found.append((np.array(ids, np.int32), np.array(trained, bool)))
        return found

    def _pieces(self, turns: Turns) -> Iterator[tuple[str, int | None, bool]]:
        """Symbols, and the texts between them and the borders of answers: (piece, id of a symbol, whether it is of an answer)."""
        border = re.compile(f"{self._pattern.pattern}|(?<={re.escape(turns.beginning)})")
        borders = [0, *itertools.chain(*turns.spans), len(turns.text)]
        for number, (first, end) in enumerate(itertools.pairwise(borders)):
            for piece in border.split(turns.text[first:end]):
                if piece in self.symbols:
                    yield piece, self.symbols[piece], number % 2 == 1
                elif piece:  # without its mark it may well be spelled as a symbol
                    yield piece.replace(turns.mark, "") if turns.mark else piece, None, number % 2 == 1


def symbol_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The spelling of each symbol of the chat formats that a tokenizer has, and its id; where it has none, it is text."""
    found = dict(zip(SYMBOLS[:3], (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id), strict=True))
    for symbol in SYMBOLS[3:]:
        try:
            found[symbol] = tokenizer.symbol_id(symbol)
        except ValueError:
            continue
    return found


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids by one of which an assistant's turn ends: that of the turn's end where there is one, and that of the text's."""
    symbols = symbol_ids(tokenizer)
    return tuple(dict.fromkeys(symbols[symbol] for symbol in (END, SYMBOLS[2]) if symbol in symbols))


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Groups that are small in memory when they are rendered: each answer with and without, and all that came before it."""
    batch, characters = [], 0
    for conversation in conversations:
        so_far = len(str(conversation.tools))
        for message in conversation.messages:
            so_far += len(str(message))
            characters += 2 * so_far * (message["role"] == "assistant")
        batch.append(conversation)
        if len(batch) == _TOGETHER or characters >= _TOGETHER_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_conversations(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, template: Template, quarantine: Quarantine | None = None
) -> Examples:
    """The texts of all conversations as ids.

    Args:
      quarantine: takes the conversations that the template refuses, under the reason "refused"; the one that took the bad
        records of their files, so that they are counted as seen.
    Raises:
      ValueError: as `ConversationEncoder.examples`; without a quarantine, the template refuses a conversation; or there is none.
    """
    encoder = ConversationEncoder(tokenizer, template)
    examples, seen, refused = [], 0, 0
    for together in _batches(conversations):
        seen += len(together)
        for conversation, found in zip(together, encoder.examples(together), strict=True):
            if not isinstance(found, ValueError):
                examples += found
                continue
            if quarantine is None:
                raise ValueError(f"{conversation.name}: {found}") from found
            refused += 1
            quarantine.add(conversation.name, BadRecord("refused", str(found), repr(conversation.messages).encode()))
    if not examples:
        raise ValueError(f"there is no conversation to learn from, of {seen} with {refused} refused")
    return Examples(examples, conversations=seen - refused, refused=refused, tokenizer=tokenizer.fingerprint)
