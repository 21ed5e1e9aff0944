"""Bad records put aside: which they are, what is wrong with each, and whether they are too many."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from data_pipelines.sources.records import BadRecord, Record

_EXCERPT_BYTES = 200


@dataclasses.dataclass(kw_only=True)
class RecordCounts:
    """Records of one side of the split: how many were seen, how many were bad for each reason, and the first bad one.

    Plain values, so that `RecordCounts(**json.loads(text))` undoes `json.dumps(dataclasses.asdict(counts))`. The counts of
    several quarantines add up with `+`, and so with `sum(counts, RecordCounts())`.
    """

    seen: int = 0
    bad: dict[str, int] = dataclasses.field(default_factory=dict)
    first: dict[str, str] | None = None

    def __add__(self, other: "RecordCounts") -> "RecordCounts":
        """Both together; the first bad record is the left one's, where it has one."""
        bad = {reason: self.bad.get(reason, 0) + other.bad.get(reason, 0) for reason in sorted(self.bad | other.bad)}
        return RecordCounts(seen=self.seen + other.seen, bad=bad, first=self.first or other.first)

    def check(self, limit: float, file: epath.PathLike) -> None:
        """Raises a ValueError if more than the share `limit` (0 to 1) of the records is bad. file: where they are listed."""
        if not 0 <= limit <= 1:
            raise ValueError(f"the limit of bad records is a share from 0 to 1, got {limit}")
        total = sum(self.bad.values())
        if total <= limit * self.seen:
            return
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.bad.items()))
        raise ValueError(
            f"{total:,} of {self.seen:,} records are bad, {total / self.seen:.3%} where {limit:.3%} may be: {reasons}. The first "
            f"is {self.first['where']}: {self.first['message']}. All are listed in {file}; repair the source, or allow more"
        )


class Quarantine:
    """A file of bad records, one JSON object a line, that appears under its name when all of it is written: a context manager.

    Each line has `where` (file relative to the source, and line or row), `reason` (a short class, see `BadRecord`), `message` and
    `excerpt` (the record's first bytes; what is no UTF-8 is escaped). The file depends on the records alone, not on where the
    source lies. Left through an error, the lines so far stay in the hidden file beside it.

    counts: of the records that were seen with this quarantine.
    """

    def __init__(self, path: epath.PathLike):
        """path: of the file; its folder must exist. One that is there already is replaced."""
        self.counts = RecordCounts()
        self._path = epath.Path(path)
        self._part = self._path.parent / f".{self._path.name}.part"
        self._file = None

    def __enter__(self) -> "Quarantine":
        """Opens the file."""
        self._file = self._part.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        """Closes the file, and names it if all is well."""
        self._file.close()
        self._file = None
        if kind is None:
            self._part.replace(self._path)

    def add(self, where: str, bad: BadRecord) -> None:
        """Puts a bad record, counted as seen already, aside. where: file and line or row."""
        excerpt = bad.content[:_EXCERPT_BYTES].rstrip(b"\r\n").decode("utf-8", "backslashreplace")
        entry = {"where": where, "reason": bad.reason, "message": str(bad), "excerpt": excerpt}
        self._file.write(json.dumps(entry).encode() + b"\n")
        self.counts.bad[bad.reason] = self.counts.bad.get(bad.reason, 0) + 1
        self.counts.first = self.counts.first or entry

    def check(self, limit: float) -> None:
        """Raises a ValueError if more than the share `limit` of the records seen is bad; call it inside or after the `with`."""
        if self._file is not None:
            self._file.flush()
        self.counts.check(limit, self._path if self._file is None else self._part)


def good_records(
    contents: Iterable[tuple[int, Any]],
    parse: Callable[[Any], tuple[str, float | None]],
    path: epath.PathLike,
    name: str,
    quarantine: Quarantine | None,
) -> Iterator[Record]:
    """The records that can be read; the others go to the quarantine, if there is one.

    Args:
      contents: (line or row, what there is of it).
      parse: gives text and difficulty of a content, or raises BadRecord.
      path: of the file, for errors; name: the same relative to the source, for the quarantine.
    Raises:
      ValueError: a bad record and no quarantine; the message names file and line.
    """
    for index, content in contents:
        if quarantine is not None:
            quarantine.counts.seen += 1
        try:
            text, difficulty = parse(content)
        except BadRecord as bad:
            if quarantine is None:
                raise ValueError(f"{path}:{index}: {bad}") from bad
            quarantine.add(f"{name}:{index}", bad)
            continue
        yield Record(index, text, difficulty)
