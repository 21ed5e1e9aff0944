"""Text that grows with its tokens, up to the first stop string."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what a decoder shows where the bytes of a character are not all there


class TextStream:
    """Of one answer. Nothing is given out that a later token could still change, or that may begin a stop string.

    Args:
      decode: token ids to text; of a longer answer the text begins with that of a shorter one, but for unfinished characters.
      stop_strings: the text ends before the first of them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()):
        self._decode, self._stop_strings = decode, tuple(stop_strings)
        self._tokens: list[int] = []
        self._settled, self._before = 0, ""  # tokens whose text is decided, and that text
        self._text, self._given = "", 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All of it."""
        return self._text

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens have made sure of. `stopped` is set where a stop string has come up."""
        if self.stopped:
            return ""
        self._tokens += tokens
        self._text = self._grown()
        ends = [end for stop in self._stop_strings if (end := self._text.find(stop, max(0, self._given - len(stop)))) >= 0]
        if ends:
            self.stopped, self._text = True, self._text[: min(ends)]
            return self._give(len(self._text))
        return self._give(len(self._text.rstrip(_UNFINISHED)) - self._begun())

    def finish(self) -> str:
        """The rest, whatever it might have become."""
        return self._give(len(self._text))

    def _grown(self) -> str:
        """Decodes the last tokens alone, from one before which the text is decided: answers are long and come in small parts."""
        whole = self._decode(self._tokens[self._settled :])
        text = self._before + whole
        if len(self._tokens) - self._settled > 64 and not whole.endswith(_UNFINISHED):
            # A decoder may treat the first token apart (a space before a word); so the last 8 stay, to be decoded again.
            kept = len(self._tokens) - 8
            tail = self._decode(self._tokens[kept:])
            if tail and text.endswith(tail):
                self._settled, self._before = kept, text[: len(text) - len(tail)]
        return text

    def _begun(self) -> int:
        """Characters at the end that may begin a stop string."""
        text = self._text.rstrip(_UNFINISHED)
        return max((n for stop in self._stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)

    def _give(self, end: int) -> str:
        given, self._given = self._text[self._given : end], max(self._given, end)
        return given
