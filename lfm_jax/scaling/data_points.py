"""The points that a scaling law is fitted to: a run each, with its parameters, training tokens and loss."""

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterator

import numpy as np
from etils import epath

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
_REQUIRED = ("params", "tokens", "loss")
_OPTIONAL = ("unique_tokens", "samples", "teacher_loss", "weight_bits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
    """Runs, float64 arrays of shape [points].

    params: N, counted by one rule for all points (with embeddings or without: a law fitted to one says nothing about the other).
    tokens: D, tokens seen in training, repeated ones again. loss: in nats a token, or whatever else the law is about.
    unique_tokens: U_D, different tokens among those, for laws of repetition. samples: k, answers drawn for a question.
    teacher_loss: of the model that was distilled. weight_bits: to which the weights were rounded after training.
    """

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    unique_tokens: np.ndarray | None = None
    samples: np.ndarray | None = None
    teacher_loss: np.ndarray | None = None
    weight_bits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops(self) -> np.ndarray:
        """C = 6 N D [points], of training (Kaplan et al. 2020, section 2.1), with N as the points count it."""
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.params * self.tokens

    def take(self, which: np.ndarray) -> "Points":
        """The points that an array of indices or of booleans selects."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Points(**{name: None if value is None else value[which] for name, value in values.items()})


def points(params, tokens, loss, **others) -> Points:
    """Points from anything that broadcasts to [points]; `others` are the optional fields of `Points`.

    Raises:
      ValueError: a value is not above zero or not finite, or there are more unique tokens than tokens.
    """
    given = {"params": params, "tokens": tokens, "loss": loss, **others}
    given = {name: np.asarray(value, np.float64) for name, value in given.items()}
    shape = np.broadcast_shapes((1,), *(value.shape for value in given.values()))
    given = {name: np.broadcast_to(value, shape).copy() for name, value in given.items()}
    for name, value in given.items():
        wrong = ~(np.isfinite(value) & (value > 0))
        if wrong.any():
            raise ValueError(f"{name} must be finite and above zero, got {value[wrong][0]} at point {int(np.argmax(wrong))}")
    repeated = given.get("unique_tokens", given["tokens"]) > given["tokens"]
    if repeated.any():
        raise ValueError(f"unique_tokens are among tokens, and point {int(np.argmax(repeated))} has more of them than tokens")
    return Points(**given)


def read_points(path: epath.PathLike) -> Points:
    """Reads points of one's own: `.jsonl` with an object a line, or `.csv` with a header.

    Both name params, tokens and loss, and what else `Points` has where the law needs it; where only some lines have unique_tokens
    the others repeat nothing. Lines with `held_out` true, or `fitted` false (a seed or a rate more), are left out, as are other
    columns.

    Raises:
      ValueError: the file is of another kind, has no points to fit, or a line lacks a column or a number there, and which.
    """
    rows = [(number, row) for number, row in _rows(path) if not _is(row, "held_out") and _is(row, "fitted", otherwise=True)]
    if not rows:
        raise ValueError(f"{path} has no points that laws are fitted to")
    return _points(path, rows)


def read_held_out(path: epath.PathLike) -> Points | None:
    """The points of such a file that were kept from every fit, those with `held_out` true; None where no line says so.

    Raises:
      ValueError: as `read_points`.
    """
    rows = [(number, row) for number, row in _rows(path) if _is(row, "held_out")]
    return _points(path, rows) if rows else None


def _rows(path: epath.PathLike) -> list[tuple[int, dict]]:
    path = epath.Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path} must be .jsonl (an object a line) or .csv (with a header)")
    rows = list(_lines(path))
    if not rows:
        raise ValueError(f"{path} has no points")
    return rows


def _is(row: dict, name: str, otherwise: bool = False) -> bool:
    value = row.get(name)
    return otherwise if value in (None, "") else str(value).lower() in ("true", "1")


def _points(path: epath.PathLike, rows: list[tuple[int, dict]]) -> Points:
    names = _REQUIRED + tuple(name for name in _OPTIONAL if any(row.get(name) not in (None, "") for _, row in rows))
    columns: dict[str, list[float]] = {name: [] for name in names}
    for number, row in rows:
        if row.get("unique_tokens") in (None, ""):
            row = row | {"unique_tokens": row.get("tokens")}
        for name in names:
            columns[name].append(_number(row, name, f"{os.fspath(path)}:{number}"))
    return points(**columns)


def _lines(path: epath.Path) -> Iterator[tuple[int, dict]]:
    text = path.read_text()
    if path.suffix == ".csv":
        yield from enumerate(csv.DictReader(text.splitlines()), 2)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}:{number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{os.fspath(path)}:{number}: expected an object with params, tokens and loss, got {line[:80]}")
            yield number, row


def _number(row: dict, name: str, where: str) -> float:
    if row.get(name) in (None, ""):
        raise ValueError(f"{where} has no {name}; a point needs {', '.join(_REQUIRED)}, and what other lines of the file have")
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{where}: {name} must be a number above zero, got {row[name]!r}")
    return value
