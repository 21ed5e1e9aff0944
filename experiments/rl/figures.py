"""Figures of a batch of rollouts: of all answers, by environment, and by temperature."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.rl.rewards import varied

_OF_ANSWERS = (
    "temperature", "tokens", "turns", "truncated", "ending", "repetition", "parts", "rewards", "reward", "counts",
)  # fmt: skip


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record the figures are made of, without the texts."""
    about = {name: record[name] for name in ("environment", "difficulty", "rounds", "left_out")}
    return about | {"answers": [{name: answer[name] for name in _OF_ANSWERS} for answer in record["answers"]]}


def batch_figures(summaries: Sequence[Mapping[str, Any]], temperatures: Sequence[float]) -> dict[str, float]:
    """Of all hosts' records; what does not exist, such as the length of right answers where none is right, is left out."""
    found = _of_prompts(summaries) | _of_answers(answer for each in summaries for answer in each["answers"])
    names = sorted({each["environment"] for each in summaries})
    for name in names if len(names) > 1 else ():
        of_name = [each for each in summaries if each["environment"] == name]
        figures = _of_prompts(of_name) | _of_answers(answer for each in of_name for answer in each["answers"])
        found |= {f"{figure}_of_{name}": value for figure, value in figures.items()}
    for temperature in temperatures if len(set(temperatures)) > 1 else ():
        answers = (answer for each in summaries for answer in each["answers"] if answer["temperature"] == temperature)
        found |= {f"{figure}_at_{temperature:g}": value for figure, value in _of_answers(answers).items()}
    return found


def _of_prompts(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "groups": float(len(summaries)),
        "groups_without_variance": _share(summaries, lambda each: not varied(each["answers"])),
        "groups_replaced": float(sum(each["rounds"] - 1 for each in summaries)),
        "prompts_left_out": float(sum(each["left_out"] for each in summaries)),
    }


def _of_answers(answers: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    answers = list(answers)
    right, wrong = (
        [each["tokens"] for each in answers if each["parts"]["correct"] is not None and (each["parts"]["correct"] == 1) is wanted]
        for wanted in (True, False)
    )
    found = {
        "reward": _mean(each["reward"] for each in answers),
        "right": _share([each for each in answers if each["parts"]["correct"] is not None], lambda a: a["parts"]["correct"] == 1),
        "unscored": _share(answers, lambda each: each["reward"] is None),
        "not_counted": _share(answers, lambda each: not each["counts"]),
        "truncated": _share(answers, lambda each: each["truncated"]),
        "answer_tokens": _mean(each["tokens"] for each in answers),
        "right_answer_tokens": _mean(right), "wrong_answer_tokens": _mean(wrong),
        "turns": _mean(each["turns"] for each in answers),
        "repetition": _mean(each["repetition"] for each in answers),
    }  # fmt: skip
    for ending in ("tail_loop", "inner_loop", "limit"):
        found[ending] = _share(answers, lambda each, ending=ending: each["ending"] == ending)
    for kind, prefix in (("parts", "part"), ("rewards", "reward")):
        for name in {name: None for each in answers for name in each[kind]}:
            found[f"{prefix}_{name}"] = _mean(each[kind].get(name) for each in answers)
    return {name: value for name, value in found.items() if value is not None}


def held_out_figures(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """accuracy, the mean of "correct"; tail_loop and limit, shares; answer_tokens, their mean."""
    return {
        "accuracy": _mean(each["correct"] for each in answers) or 0.0,
        "tail_loop": _share(answers, lambda each: each["ending"] == "tail_loop"),
        "limit": _share(answers, lambda each: each["ending"] == "limit"),
        "answer_tokens": _mean(each["tokens"] for each in answers),
    }  # fmt: skip


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(statistics.fmean(known)) if known else None


def _share(values: Sequence[Any], holds: Callable[[Any], bool]) -> float:
    return sum(map(bool, map(holds, values))) / len(values) if values else 0.0
