"""Text in parts: together they are the whole, and none has to be taken back."""

import random
import re

import pytest

from lfm_jax.generation import TextStream


def _bytes(tokens):
    """A tokenizer of bytes."""
    return bytes(tokens).decode(errors="replace")


def _runs(tokens):
    """The same where, as in Hugging Face's decoder of bytes, half a character spoils those before it."""
    runs = re.split(b"([\x80-\xff]+)", bytes(tokens))
    whole = lambda run: run.decode() if run.decode(errors="ignore").encode() == run else "\ufffd" * len(run)
    return "".join(map(whole, runs))


def _words(tokens):
    """One that, as SentencePiece, leaves out the space before its first word."""
    return "".join(f" word{token}" if token else "," for token in tokens).removeprefix(" ")


TEXT = "Grüße aus Zürich, 你好 and 🙂🙂. Then stop here and go on for a while, until the end of it all. " * 3


@pytest.mark.parametrize("seed", range(5))
def test_parts_add_up_to_the_text_and_never_hold_half_a_character(seed):
    chosen, tokens, stream, parts = random.Random(seed), list(TEXT.encode()), TextStream(_bytes), []
    while tokens:
        size = chosen.randrange(1, 9)
        parts.append(stream.push(tokens[:size]))
        tokens = tokens[size:]
    assert "".join(parts) + stream.finish() == TEXT == stream.text
    assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decode", [_bytes, _runs])
@pytest.mark.parametrize(
    ("stops", "text", "with_it"),
    [
        (("while", "stop here", "zzz"), "Grüße aus Zürich, 你好 and 🙂🙂. Then ", "stop here"),
        (("Zürich, 你", "ric"), "Grüße aus Zü", "ric"),  # that which is complete first, and not that which begins first
        (("a Z", "🙂", "\ufffd"), "Grüße aus Zürich, 你好 and ", "🙂"),
    ],
    ids=["one of them", "one in the other", "in bytes"],
)
def test_it_ends_before_the_first_complete_stop_string_however_it_is_cut(seed, decode, stops, text, with_it):
    chosen, tokens, parts = random.Random(seed), list(TEXT.encode()), []
    stream = TextStream(decode, stops)
    while tokens and not stream.stopped:
        size = chosen.randrange(1, 9)
        parts.append(stream.push(tokens[:size]))
        tokens = tokens[size:]
    assert stream.stopped and stream.push(tokens) == "" and stream.finish() == ""
    assert "".join(parts) == text == stream.text
    assert stream.stopped == len((text + with_it).encode())


def test_what_may_begin_a_stop_string_waits_and_comes_when_it_does_not():
    stream = TextStream(_bytes, ("<end>",))
    assert [stream.push(part) for part in (b"a<", b"en", b"d", b"!")] == ["a", "", "", "<end!"]
    assert stream.push(b"<en") == "" and stream.finish() == "<en"


def test_the_earliest_of_two_that_come_at_once_counts():
    stream = TextStream(_bytes, ("late", "soon"))
    assert stream.push(b"so soon, too late") == "so " and stream.stopped == len("so soon")


def test_unfinished_bytes_at_the_end_are_shown_as_such():
    stream = TextStream(_bytes)
    assert stream.push("é".encode()[:1]) == "" and stream.finish() == "\ufffd"


def test_a_long_text_of_words_keeps_its_spaces():
    tokens = [random.Random(0).choice((0, 1, 2)) or index % 3 for index in range(700)]
    stream = TextStream(_words)
    parts = [stream.push(tokens[start : start + 7]) for start in range(0, 700, 7)]
    assert "".join(parts) + stream.finish() == _words(tokens)
