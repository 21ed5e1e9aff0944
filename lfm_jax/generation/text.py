"""Text that grows with its tokens, up to the first stop string."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what a decoder shows where the bytes of a character are not all there


class TextStream:
    """Of one answer. Nothing is given out that a later token could still change, or that may begin a stop string.

    Args:
      decode: token ids to text; of a longer answer the text begins with that of a shorter one, but for unfinished characters.
      stop_strings: the text ends before the first of them to be complete.

    stopped: how many of all tokens there were when one was complete; 0: none is. However the tokens are parted, it is the same.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()):
        self._decode, self._stop_strings = decode, tuple(stop_strings)
        self._tokens: list[int] = []
        self._settled, self._before = 0, ""  # tokens whose text is decided, and that text
        self._text, self._given = "", 0
        self.stopped = 0

    @property
    def text(self) -> str:
        """All of it."""
        return self._text

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens have made sure of. `stopped` is set where a stop string has come up."""
        if self.stopped:
            return ""
        before = len(self._tokens)
        self._tokens += tokens
        self._text = self._decoded(len(self._tokens))
        # Half a character may hide a stop string before it; and of two that are there, the one that begins first may be longer.
        if self._stop_at() is not None or self._stop_strings and _UNFINISHED in self._text[self._given :]:
            for count in range(before + 1, len(self._tokens) + 1):
                self._text = self._decoded(count)
                if (end := self._stop_at()) is not None:
                    self.stopped, self._text = count, self._text[:end]
                    return self._give(end)
        self._settle()
        return self._give(len(self._text.rstrip(_UNFINISHED)) - self._begun())

    def finish(self) -> str:
        """The rest, whatever it might have become."""
        return self._give(len(self._text))

    def _decoded(self, count: int) -> str:
        """The text of so many tokens, of which the last alone are decoded."""
        return self._before + self._decode(self._tokens[self._settled : count])

    def _settle(self) -> None:
        """Moves the token before which the text is decided: answers are long and come in small parts."""
        if len(self._tokens) - self._settled > 64 and not self._text.endswith(_UNFINISHED):
            # A decoder may treat the first token apart (a space before a word); so the last 8 stay, to be decoded again.
            kept = len(self._tokens) - 8
            tail = self._decode(self._tokens[kept:])
            if tail and self._text.endswith(tail):
                self._settled, self._before = kept, self._text[: len(self._text) - len(tail)]

    def _stop_at(self) -> int | None:
        """Where the first stop string that is there begins; None: none is."""
        text = self._text.rstrip(_UNFINISHED)
        found = [text.find(stop, max(0, self._given - len(stop))) for stop in self._stop_strings]
        return min((place for place in found if place >= 0), default=None)

    def _begun(self) -> int:
        """Characters at the end that may begin a stop string."""
        text = self._text.rstrip(_UNFINISHED)
        return max((n for stop in self._stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)

    def _give(self, end: int) -> str:
        given, self._given = self._text[self._given : end], max(self._given, end)
        return given
