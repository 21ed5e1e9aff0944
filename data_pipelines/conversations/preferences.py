"""Pairs of answers to a prompt, one chosen and one rejected: read, encoded as conversations are, and made into batches."""

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.conversations.chat_formats import Template
from data_pipelines.conversations.examples import ConversationEncoder, Examples
from data_pipelines.conversations.reading import (
    SUFFIXES,
    Conversation,
    ConversationsConfig,
    Wrong,
    read_message,
    read_object,
    read_tools,
    split_fraction,
    written,
)
from data_pipelines.loading.loader import (
    DatasetIterator,
    EvaluationBatches,
    LoaderConfig,
    evaluation_batches_of,
    training_batches_of,
)
from data_pipelines.loading.rows import Batch, Place
from data_pipelines.sources.documents import Split
from data_pipelines.sources.quarantine import Quarantine, good_records
from data_pipelines.sources.records import BadRecord
from data_pipelines.sources.text_files import find_text_files, read_lines
from data_pipelines.tokenization.tokenizer import Tokenizer

# Pairs that are rendered and encoded together.
_TOGETHER = 256


class Preference(NamedTuple):
    """A prompt, and the same with each of two answers. name: for messages to people: file and line."""

    prompt: Conversation
    chosen: Conversation
    rejected: Conversation
    name: str = "pair"


def read_preferences(
    config: ConversationsConfig, split: Split, quarantine: Quarantine | None = None
) -> Iterator[Preference]:
    """The pairs of one split, in the order of files and lines; the same on every machine.

    A line is {"prompt": [messages], "chosen": [messages], "rejected": [messages], "tools": [...]}, as TRL has them. The prompt
    may be called "messages", or be text, which is a user's; an answer may be text, which is the assistant's, or begin with
    the prompt once more; and without a prompt it is what both answers begin with. Tools are optional. Which side of the split a
    pair is on is decided as for conversations, so that what is held out of the one is held out of the other.

    Args:
      quarantine: takes the bad records of both splits, and reading goes on. Their reasons are those of conversations, and
        "no_pair": there are no two answers to a prompt, or they are the same.
    Raises:
      FileNotFoundError: the source does not exist.
      ValueError: a bad record and no quarantine, a damaged file, a source of other files, or a split without a pair.
    """
    files = find_text_files(config.source)
    others = [name for name, _ in files if not name.endswith(SUFFIXES)]
    if others:
        raise ValueError(f"source {config.source!r} holds {others[0]}; pairs are read from {', '.join(SUFFIXES)}")
    found = False
    parse = functools.partial(_parse, max_bytes=config.max_record_bytes)
    for file, path in files:
        lines = read_lines(path, config.max_record_bytes, None)
        for record in good_records(lines, parse, path, file, quarantine):
            prompt, chosen, rejected, tools = json.loads(record.text)
            if (split_fraction([*prompt, *chosen]) < config.held_out_share) == (split == "held_out"):
                found = True
                name = f"{file}:{record.index}"
                yield Preference(*(Conversation([*prompt, *answer], tools, name) for answer in ([], chosen, rejected)), name)
    if not found:
        raise ValueError(
            f"no pair of source {config.source!r} is in the {split!r} split with held_out_share {config.held_out_share}; change "
            "held_out_share, or give more pairs"
        )


def _parse(line: bytes, max_bytes: int) -> tuple[str, None]:
    """A line's pair, as the JSON of [prompt, chosen, rejected, tools], and no difficulty."""
    record = read_object(line, max_bytes, "'chosen' and 'rejected'")
    missing = [name for name in ("chosen", "rejected") if not isinstance(record.get(name), str | list)]
    if missing:
        raise BadRecord("no_field", f"expected text or a list of messages {missing[0]!r}; name it so", line)
    prompt, chosen, rejected = _parted(record, line)
    try:
        prompt, chosen, rejected = (
            [read_message(entry, f"message {number} of the {part}") for number, entry in enumerate(messages)]
            for part, messages in (("prompt", prompt), ("chosen answer", chosen), ("rejected answer", rejected))
        )
        tools = read_tools(record.get("tools"))
    except Wrong as wrong:
        raise BadRecord(wrong.reason, str(wrong), line) from wrong
    if not prompt or any(not answer or answer[0]["role"] != "assistant" for answer in (chosen, rejected)):
        raise BadRecord("no_pair", "expected a prompt and behind it two answers that an assistant begins; repair it", line)
    if prompt[-1]["role"] == "assistant":
        raise BadRecord("no_pair", "the prompt ends with an assistant's message; give it as the beginning of both answers", line)
    if chosen == rejected:
        raise BadRecord("no_pair", "the chosen and the rejected answer are the same: nothing is preferred; remove it", line)
    return written([prompt, chosen, rejected, tools], line), None


def _parted(record: dict[str, Any], line: bytes) -> tuple[list[Any], list[Any], list[Any]]:
    """Prompt and the two answers as lists of what should be messages."""
    prompt = record.get("prompt", record.get("messages"))
    chosen, rejected = (
        [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        for answer in (record["chosen"], record["rejected"])
    )
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt is None:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
        prompt = [message for message, _ in same]
    if not isinstance(prompt, list):
        raise BadRecord("no_field", f"'prompt' is {type(prompt).__name__}, not text or a list of messages; repair it", line)
    begins = lambda answer: len(answer) > len(prompt) and answer[: len(prompt)] == prompt
    if begins(chosen) and begins(rejected):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def encode_preferences(
    preferences: Iterable[Preference], tokenizer: Tokenizer, template: Template, quarantine: Quarantine | None = None
) -> Examples:
    """The two texts of each pair as ids, the chosen one before the rejected: pair n has the texts 2n and 2n + 1.

    The ids are those of the same conversations in `encode_conversations`; trained are those of the answer alone, not those of
    earlier answers in the prompt. `conversations` counts pairs.

    Args:
      quarantine: takes the pairs that the template refuses, and those whose answer it spreads over several texts, as "refused".
    Raises:
      ValueError: as `ConversationEncoder.examples`; without a quarantine, a pair is refused; or there is none.
    """
    encoder = ConversationEncoder(tokenizer, template)
    texts, seen, refused = [], 0, 0
    iterator = iter(preferences)
    while together := list(itertools.islice(iterator, _TOGETHER)):
        seen += len(together)
        encoded = encoder.examples([side for pair in together for side in (pair.chosen, pair.rejected)])
        prompts = encoder.each_prompt([pair.prompt for pair in together])
        for number, (pair, prompt) in enumerate(zip(together, prompts, strict=True)):
            try:
                if isinstance(prompt, ValueError):
                    raise ValueError(f"{pair.prompt.name}: {prompt}") from prompt
                both = [_answer(found, prompt, pair.name) for found in encoded[2 * number : 2 * number + 2]]
            except ValueError as error:
                if quarantine is None:
                    raise
                refused += 1
                quarantine.add(pair.name, BadRecord("refused", str(error), repr(pair.chosen.messages).encode()))
            else:
                texts += both
    if not texts:
        raise ValueError(f"there is no pair to learn from, of {seen} with {refused} refused")
    return Examples(texts, conversations=seen - refused, refused=refused, tokenizer=tokenizer.fingerprint)


def _answer(
    texts: list[tuple[np.ndarray, np.ndarray]] | ValueError, prompt: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The text that the answer is in, with nothing trained but the answer."""
    if isinstance(texts, ValueError):
        raise ValueError(f"{name}: {texts}") from texts
    found = [(ids, trained) for ids, trained in texts if np.array_equal(ids[: len(prompt)], prompt)]
    found = [(ids, trained) for ids, trained in found if trained[len(prompt) :].any()]
    if len(found) != 1:
        raise ValueError(
            f"{name}: the template writes the answer in {len(found)} texts that begin with the prompt; a pair has one for each "
            "answer: let it end with the assistant's first message"
        )
    ids, trained = found[0]
    return ids, trained & (np.arange(len(ids)) >= len(prompt))


class PairRows:
    """Pairs of one length: each answer with its prompt in a row of its own, and the two rows side by side. Can be pickled.

    What a row has no place for is cut off at its end; a pair of which one answer has nothing left is not used.

    seq_len: positions of a row. rows: [1] int64, the number of pairs, as of one file. truncated: answers that were cut, of the
    pairs that are used; cut_tokens: ids that they have lost; dropped: pairs that are not used. counts: [pairs, 2] int64, the
    trained targets of each answer. tokens: positions that are in use, of all pairs. fingerprint: of all of it.
    """

    def __init__(self, examples: Examples, seq_len: int, tokenizer: Tokenizer):
        """Raises ValueError if another tokenizer made the ids, or seq_len leaves no pair."""
        if examples.tokenizer != tokenizer.fingerprint:
            raise ValueError(
                f"the pairs were encoded by the tokenizer {examples.tokenizer[:12]}, not by {tokenizer.fingerprint[:12]}; encode "
                "them again"
            )
        self._examples, self.seq_len, self._pad_id = examples, seq_len, tokenizer.pad_id
        every = np.array([examples[number][1][1 : seq_len + 1].sum() for number in range(len(examples))], np.int64).reshape(-1, 2)
        self._used = np.flatnonzero(every.all(axis=1))
        if not len(self._used):
            raise ValueError(f"no pair has of both answers something in their first {seq_len} tokens; raise seq_len")
        self.counts, self.dropped = every[self._used], len(every) - len(self._used)
        positions = (examples.lengths - 1).reshape(-1, 2)[self._used]  # the last id is no input
        self.truncated = int(np.sum(positions > seq_len))
        self.cut_tokens = int(np.sum(np.maximum(positions - seq_len, 0)))
        self.tokens = int(np.sum(np.minimum(positions, seq_len)))
        self.rows = np.array([len(self._used)], np.int64)
        self.fingerprint = hashlib.sha256(f"{examples.fingerprint} {seq_len}".encode()).hexdigest()
        self._reference: np.ndarray | None = None
        self._first = np.cumsum(self.counts.ravel()) - self.counts.ravel()

    def with_reference(self, log_probs: np.ndarray, fingerprint: str) -> "PairRows":
        """The same pairs, with log-probabilities of a reference.

        Args:
          log_probs: [trained targets] float32, of all pairs in their order, of each the chosen answer's before the rejected's.
          fingerprint: of what they depend on, the pairs apart.
        Raises:
          ValueError: they are not as many as the trained targets.
        """
        if log_probs.shape != (int(self.counts.sum()),):
            raise ValueError(f"expected {self.counts.sum()} log-probabilities, one a trained target, got {log_probs.shape}")
        rows = copy.copy(self)
        rows._reference = log_probs
        rows.fingerprint = hashlib.sha256(f"{self.fingerprint} {fingerprint}".encode()).hexdigest()
        return rows

    def make(self, places: Sequence[Place | None]) -> list[Batch]:
        """Of each place a pair: tokens, targets, segment_ids, positions, loss_mask (see `lfm_jax.training.Batch`) of the chosen
        answer, [seq_len] each, and under rejected_tokens and so on those of the rejected one; with a reference also
        reference_log_probs and rejected_reference_log_probs, float32, 0 where nothing is trained. None is a row of padding."""
        return [
            {**self._answer(place, 0), **{f"rejected_{name}": array for name, array in self._answer(place, 1).items()}}
            for place in places
        ]

    def _answer(self, place: Place | None, which: int) -> Batch:
        row = {name: np.zeros(self.seq_len, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        row["loss_mask"] = np.zeros(self.seq_len, np.float32)
        row["tokens"][:] = row["targets"][:] = self._pad_id
        if self._reference is not None:
            row["reference_log_probs"] = np.zeros(self.seq_len, np.float32)
        if place is None:
            return row
        ids, trained = (array[: self.seq_len + 1] for array in self._examples[2 * int(self._used[place.row]) + which])
        here = slice(0, len(ids) - 1)
        row["tokens"][here], row["targets"][here], row["loss_mask"][here] = ids[:-1], ids[1:], trained[1:]
        row["segment_ids"][here], row["positions"][here] = 1, np.arange(len(ids) - 1)
        if self._reference is not None:
            first = self._first[2 * place.row + which]
            values = self._reference[first : first + self.counts[place.row, which]]
            row["reference_log_probs"][row["loss_mask"] > 0] = values
        return row


def preference_batches(
    sources: Sequence[PairRows],
    config: LoaderConfig,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> DatasetIterator:
    """This host's pairs of each batch, as `training_batches` gives rows of texts: what is said there holds here.

    Args:
      sources: of each source; `config.weights` are their shares of the pairs, and `config.batch_size` counts pairs.
      process_index, process_count: which host this is, of how many; None: as jax says.
    Raises:
      ValueError: a batch cannot be shared evenly by the hosts, weights do not fit the sources, or an order, a change or a length
        is asked for that the pairs do not have.
    """
    if config.order != "shuffled" or config.fill_in_the_middle:
        raise ValueError(
            f"pairs come shuffled and as they are, not with order {config.order!r} and fill_in_the_middle "
            f"{config.fill_in_the_middle}; leave both as they are by default"
        )
    lengths = {seq_len for _, seq_len in config.shapes()} | {rows.seq_len for rows in sources}
    if len(lengths) > 1:
        raise ValueError(f"pairs have one length all the time, not {', '.join(map(str, sorted(lengths)))}; set one seq_len")
    rows = {config.seq_len: sources}
    return training_batches_of(rows, rows, config, process_index=process_index, process_count=process_count)


def preference_evaluation_batches(
    rows: PairRows, batch_size: int, *, process_index: int | None = None, process_count: int | None = None
) -> EvaluationBatches:
    """Batches with every pair once, as `evaluation_batches` gives them of texts. Arguments and errors as above."""
    return evaluation_batches_of(
        rows, rows, rows.seq_len, batch_size, process_index=process_index, process_count=process_count
    )  # fmt: skip
