"""GSM8K: word problems of primary school, written by people, with worked solutions (Cobbe et al. 2021, arXiv 2110.14168)."""

import json
import random
import re
from typing import Any, get_args

from etils import epath

from data_pipelines.tasks.answers import final_answer, number, score_number
from data_pipelines.tasks.task import Problem, Scores, Split, split_of

_MOST_STEPS = 6
_CALCULATION = re.compile(r"<<[^<>]*>>")
_END = "\n#### "
_FORM = 'Reason step by step, and end with a line "Answer: N", where N is a number.'


class Gsm8k:
    """The problems of a file of GSM8K (train.jsonl or test.jsonl of openai/grade-school-math), one a line.

    Difficulty is the number of calculations that the published solution marks: 1 to 5, and 6 for six or more. Seeds count through
    the problems of a difficulty and split in an order that the seed's epoch decides: each comes once before any comes again.

    Raises:
      ValueError: a line of the file is no problem of GSM8K.
    """

    name = "gsm8k"
    max_difficulty = _MOST_STEPS

    def __init__(self, path: epath.PathLike):
        self._problems: dict[tuple[int, Split], list[Problem]] = {
            (steps, split): [] for steps in range(1, _MOST_STEPS + 1) for split in get_args(Split)
        }
        for at, line in enumerate(epath.Path(path).read_bytes().splitlines(), 1):
            try:
                question, steps, problem = _read(line)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                expected = 'expected an object with "question" and "answer", which ends with "#### " and a number'
                raise ValueError(f"{path}, line {at}: {expected}, got {line[:100].decode(errors='replace')!r}") from error
            self._problems[steps, split_of(question)].append(problem)

    def sample(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Task.sample`. The content is the question's words.

        Raises:
          ValueError: there are no problems of this difficulty and split.
        """
        found = self._problems.get((difficulty, split))
        if not found:
            raise ValueError(f"gsm8k has difficulties 1 to {_MOST_STEPS} and {get_args(Split)}; none of {difficulty}, {split!r}")
        epoch, at = divmod(seed, len(found))
        order = random.Random(json.dumps([self.name, difficulty, split, epoch])).sample(range(len(found)), len(found))
        return found[order[at]]

    def score(self, response: str, reference: str) -> Scores:
        """As `score_number`, but a percent sign is a unit and counts for nothing: the references have no units."""
        answer = final_answer(response)
        found = None if answer is None else number(answer.removesuffix("%").removesuffix("\\"))
        correct = found is not None and found == number(reference)
        return {**score_number(response, reference), "correct": float(correct)}


def _read(line: bytes) -> tuple[str, int, Problem]:
    """(the words of the question, the difficulty, the problem)."""
    row: Any = json.loads(line)
    json.dumps(row, ensure_ascii=False).encode()  # "\ud800" is valid JSON
    worked, end, last = row["answer"].rpartition(_END)
    answer = number(last)
    if not end or answer is None:
        raise ValueError(last)
    problem = Problem(
        messages=[{"role": "user", "content": f"{row['question']}\n\n{_FORM}"}],
        reference=str(answer),
        solution=f"{_CALCULATION.sub('', worked)}\nAnswer: {last.strip()}",
    )
    calculations = len(_CALCULATION.findall(worked))
    words = " ".join(re.findall(r"\w+", row["question"].lower()))
    return words, min(max(calculations, 1), _MOST_STEPS), problem
