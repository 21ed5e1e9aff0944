"""Batches of rollouts on disk, everything in them, and as arrays to learn from, made of what is on disk and nothing else."""

import base64
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments.json_lines import read_lines, write_lines

FOLDER = "rollouts"
TRAINER = ("old_log_probs", "reference_log_probs")  # of the drawn tokens; computed when an answer is first learnt from


def encoded_bits(kept: Sequence[np.ndarray]) -> str | None:
    """Bit sets, [tokens, words] uint32, as text; None of none."""
    if not len(kept):
        return None
    return base64.b64encode(zlib.compress(np.stack(kept).astype("<u4").tobytes())).decode()


def decoded_bits(text: str, tokens: int) -> np.ndarray:
    """[tokens, words] uint32."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4").reshape(tokens, -1)


def encoded_routing(routing: np.ndarray | None) -> str | None:
    """Experts, [tokens, moe layers, top_k], as text; None of none."""
    return None if routing is None else base64.b64encode(zlib.compress(routing.astype("<i2").tobytes())).decode()


def decoded_routing(text: str, shape: tuple[int, int]) -> np.ndarray:
    """[tokens, *shape] int16."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i2").reshape(-1, *shape)


class Files:
    """The batches in a workdir's folder rollouts/: a file for each, NNNNNN.jsonl, a prompt a line; of several hosts each its own,
    NNNNNN-0-of-4.jsonl. So hosts of another number than before read what those have left, and replace none of it.

    Args:
      part: (index, count) of this host among those that have prompts of their own.
    """

    def __init__(self, workdir: epath.Path, part: tuple[int, int]):
        self._folder, self._parts, self._ending = workdir / FOLDER, part[1], _ending(*part)
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, batch: int, records: Sequence[dict[str, Any]]) -> None:
        """Whole or not at all; what was there is replaced."""
        write_lines(self._folder / f"{batch:06d}{self._ending}", records)

    def read(self, batch: int, slots: range, parts: int) -> list[dict[str, Any]]:
        """The records of these slots, as so many hosts have written them; if there are as many no longer, they are written anew.

        Raises:
          ValueError: they are not there.
        """
        paths = [self._folder / f"{batch:06d}{_ending(part, parts)}" for part in range(parts)]
        if parts > 1 and not any(path.exists() for path in paths):  # of a run from before the number was in the name
            paths = [self._folder / f"{batch:06d}-{part}.jsonl" for part in range(parts)]
        found = {record["slot"]: record for path in paths if path.exists() for record in read_lines(path)}
        missing = [slot for slot in slots if slot not in found]
        if missing:
            path = self._folder / f"{batch:06d}.jsonl"
            raise ValueError(
                f"{path} has not all rollouts that the checkpoint was made in the middle of: those of slots {missing} are "
                "missing; take an earlier checkpoint, or a new workdir"
            )
        records = [found[slot] for slot in slots]
        if parts != self._parts:
            self.write(batch, records)
        return records

    def keep(self, batches: Collection[int]) -> None:
        """Removes all others of this host."""
        for path in self._folder.glob(f"*{self._ending}"):
            name = path.name.removesuffix(self._ending)
            if name.isdecimal() and int(name) not in batches:
                path.unlink(missing_ok=True)


def _ending(part: int, parts: int) -> str:
    return ".jsonl" if parts == 1 else f"-{part}-of-{parts}.jsonl"


def longest(records: Sequence[dict[str, Any]]) -> int:
    """Positions that the longest row takes."""
    return max(len(record["prompt_ids"]) + len(answer["token_ids"]) for record in records for answer in record["answers"]) - 1


def arrays(
    records: Sequence[dict[str, Any]],
    seq: int,
    words: int | None,
    *,
    greedy_as: float = 1.0,
    routing: tuple[int, int] | None = None,
    environments: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """The batch of `policy_objective`: an answer in each row, those to a prompt beside each other.

    Args:
      seq: positions of a row. words: of `kept`, which is there if they are given. routing: (moe layers, top_k) of `routing`, the
        same. greedy_as: see `RolloutsConfig`. environments: names; without them there is no `environment`.
    """
    answers = [(record["prompt_ids"], answer) for record in records for answer in record["answers"]]
    rows = len(answers)
    batch = {name: np.zeros((rows, seq), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    trainer = [name for name in TRAINER if all(name in answer for _, answer in answers)]
    batch |= {name: np.zeros((rows, seq), np.float32) for name in ("loss_mask", "advantages", "sampler_log_probs", *trainer)}
    batch["temperature"] = np.array([answer["temperature"] or greedy_as for _, answer in answers], np.float32)
    if words is not None:
        batch["kept"] = np.zeros((rows, seq, words), np.uint32)
    if routing is not None:
        batch["routing"] = np.full((rows, seq, *routing), -1, np.int16)
    if environments:
        of_each = [environments.index(record["environment"]) for record in records for _ in record["answers"]]
        batch["environment"] = np.array(of_each, np.int32)
    for row, (prompt, answer) in enumerate(answers):
        ids = np.array(prompt + answer["token_ids"], np.int32)
        length = len(ids) - 1
        batch["tokens"][row, :length], batch["targets"][row, :length] = ids[:-1], ids[1:]
        batch["segment_ids"][row, :length], batch["positions"][row, :length] = 1, np.arange(length)
        (drawn,) = np.nonzero(answer["drawn"])
        places = len(prompt) - 1 + drawn
        batch["loss_mask"][row, places] = answer["counts"]
        batch["advantages"][row, places] = np.float32(answer["advantage"]) + np.float32(answer.get("token_advantages") or 0)
        for name, key in (("sampler_log_probs", "log_probs"), *zip(trainer, trainer, strict=True)):
            batch[name][row, places] = answer[key]
        if words is not None and answer["kept"] is not None:
            batch["kept"][row, places] = decoded_bits(answer["kept"], len(places))
        if routing is not None:
            batch["routing"][row, :length] = decoded_routing(answer["routing"], routing)
    return batch


def with_log_probs(records: Sequence[dict[str, Any]], name: str, log_probs: np.ndarray) -> None:
    """Puts what a trainer computed, [rows, seq] in the order of `arrays`, into the answers."""
    rows = iter(log_probs)
    for record in records:
        for answer in record["answers"]:
            (drawn,) = np.nonzero(answer["drawn"])
            answer[name] = next(rows)[len(record["prompt_ids"]) - 1 + drawn].tolist()
