"""What holds for every task: problems by their arguments, disjoint splits, solutions that score 1, and a score for any text."""

import dataclasses
import hashlib
import json
import random

import pytest

from data_pipelines.tasks import TASKS, Problem, in_turn, pick, task_named, tasks_named
from data_pipelines.tasks.task import draw, split_of

EVERY = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
# Of the problems that are looked at below: a machine, a version of Python or a change that makes other ones is seen.
DIGESTS = {
    "arithmetic": "f1632c6bd1fd9ff7",
    "word_problems": "0ff6d5316065ff6d",
    "extraction": "c6f834aad4eac0ea",
    "instructions": "e9788ec83519de47",
    "tool_use": "181fa17747831505",
    "tool_use_lfm3": "882ba10797ec4d94",
    "numbers_game": "5eeca95d74161700",
}


def levels(task):
    return range(1, task.max_difficulty + 1)


def text_of(problem: Problem) -> str:
    return json.dumps(dataclasses.asdict(problem), sort_keys=True)


@EVERY
def test_a_problem_follows_from_its_arguments_alone(task):
    state = random.getstate()
    arguments = [(seed, level, split) for level in levels(task) for split in ("train", "held_out") for seed in range(8)]
    problems = [text_of(task.sample(*each)) for each in arguments]
    assert random.getstate() == state, "the generator that everybody shares has been drawn from"
    assert len(set(problems)) >= len(problems) - 1
    assert [text_of(task.sample(*each)) for each in arguments] == problems
    assert hashlib.sha256("\n".join(problems).encode()).hexdigest()[:16] == DIGESTS[task.name]


@EVERY
def test_a_problem_is_plain_json(task):
    problem = task.sample(3, task.max_difficulty)
    assert Problem(**json.loads(text_of(problem))) == problem
    assert problem.messages[-1]["role"] == "user" and problem.messages[-1]["content"]


@EVERY
def test_no_question_is_in_both_splits(task):
    """The questions themselves, by brute force; the files beside this one compare what is asked behind the words."""
    asked = {
        split: {task.sample(seed, level, split).messages[-1]["content"] for level in levels(task) for seed in range(80)}
        for split in ("train", "held_out")
    }
    assert not asked["train"] & asked["held_out"]
    assert min(map(len, asked.values())) > 65 * task.max_difficulty, "the same few questions again and again"


@EVERY
def test_the_worked_solution_scores_one_and_nothing_scores_zero(task):
    for level in levels(task):
        for seed in range(40):
            for split in ("train", "held_out"):
                problem = task.sample(seed, level, split)
                scores = task.score(problem.solution, problem.reference)
                assert scores["correct"] == 1 and set(scores.values()) <= {1.0, None}, problem
                for nothing in ("", " \n\t"):
                    assert set(task.score(nothing, problem.reference).values()) <= {0.0, None}


@EVERY
def test_the_solution_of_another_problem_is_not_correct(task):
    """Of the same difficulty; constraints of two problems may well be kept by one text, so there only most are not."""
    problems = [task.sample(seed, task.max_difficulty) for seed in range(40)]
    correct = [task.score(a.solution, b.reference)["correct"] for a, b in zip(problems, problems[1:], strict=False)]
    assert sum(correct) <= 1


INSERTED = (
    "", " ", "\n", "\x00", "\ud800", "\u202e", "é", "٣", "\\boxed{", "}", "{", "[" * 50, '"', "\\", ",", ".", "-", "1e999", "NaN",
    "null", "Answer: ", "```", "```json\n", "***", "******", "<<", ">>", "0" * 200, "/0", "%", "<|im_end|>", "\\u0000", "\\ud800",
    "true",
)  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randrange(1, 5)):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice((
            text[:a] + text[b:], text[:b] + text[a:], text[:a], text[a:], text[:a] + rng.choice(INSERTED) + text[a:],
            text[:a] + rng.choice(INSERTED) + text[b:], text[:a] + text[a:b][::-1] + text[b:],
        ))  # fmt: skip
    return text


@EVERY
def test_any_text_has_a_score(task):
    rng = random.Random(0)
    for seed in range(60):
        problem = task.sample(seed, seed % task.max_difficulty + 1)
        names = task.score(problem.solution, problem.reference).keys()
        for _ in range(60):
            scores = task.score(mutated(problem.solution, rng), problem.reference)
            assert scores.keys() == names and all(score is None or 0 <= score <= 1 for score in scores.values())


# Some are as long as a response may be: what takes time in the square of the length would be seen.
LONG = 99_000
HUGE = {
    "a million digits": "9" * 1_000_000,
    "a number of ten thousand digits": "Answer: " + "9" * 10_000,
    "a million lines": "Answer: 1\n" * 1_000_000,
    "ten thousand arrays": "[" * 10_000 + "]" * 10_000,
    "ten thousand objects": '{"a":' * 10_000 + "1" + "}" * 10_000,
    "a hundred arrays": "[" * 100 + "]" * 100,
    "a JSON number of ten thousand digits": '{"total": ' + "9" * 10_000 + "}",
    "surrogates": "\ud800" * LONG,
    **{
        f"{piece!r} again and again": piece * (LONG // len(piece)) + "x"
        for piece in (
            ".", "!", "[", "]", "<", ">", "<<", "*", "* ", "*\n", "**", "`", "```\n", '"', "'", "-", "\n", "\n\n", " ", "\t", "{",
            "}", "\\boxed{", "Answer:", "Answer:\n", "answer *", "P.", "p. p", "Section 1", "Section ", "0", "1,", "a", "A", "é",
            "\ud800 ", '{"a":1},', "[1,", "mr.", '."', ". a", ".*",
        )
    },
}  # fmt: skip


@EVERY
def test_huge_and_deep_texts_score_low(task):
    problems = [task.sample(seed, task.max_difficulty) for seed in range(3)]
    for text in HUGE.values():
        for problem in problems:
            assert task.score(text, problem.reference)["correct"] == 0


def test_one_content_in_eight_is_held_out():
    held_out = sum(split_of([number, "what is asked"]) == "held_out" for number in range(8000))
    assert 900 < held_out < 1100


@EVERY
def test_difficulties_and_splits_that_are_none_are_refused(task):
    with pytest.raises(ValueError, match=f"{task.name} has difficulties 1 to {task.max_difficulty}, got 0"):
        task.sample(0, 0)
    with pytest.raises(ValueError, match="split must be one of .*'held_out'.*, got 'test'"):
        task.sample(0, 1, "test")


def test_a_task_with_one_question_has_no_second_split():
    task = TASKS["arithmetic"]
    make = lambda rng: (Problem(messages=[], reference=None), "the only one")
    assert draw(task, 0, 1, split_of("the only one"), make).messages == []
    other = "train" if split_of("the only one") == "held_out" else "held_out"
    with pytest.raises(ValueError, match=f"arithmetic, difficulty 1, seed 0: of 200 problems none is {other}; make it draw more"):
        draw(task, 0, 1, other, make)


def test_tasks_have_names():
    assert all(task_named(name) is task and task.name == name for name, task in TASKS.items())
    with pytest.raises(ValueError, match="no task is named 'arithmetics'; did you mean 'arithmetic'?"):
        task_named("arithmetics")
    with pytest.raises(ValueError, match="no task is named 'gsm8k'; there are arithmetic, .*, gsm8k:PATH and reasoning_gym:NAME"):
        task_named("gsm8k")


def test_tasks_of_one_name_are_refused(tmp_path):
    files = [tmp_path / name for name in ("train.jsonl", "test.jsonl")]
    for file in files:
        file.write_text(json.dumps({"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}))
    names = [f"gsm8k:{file}" for file in files]
    assert [task.name for task in tasks_named(["arithmetic", names[0]])] == ["arithmetic", "gsm8k"]
    with pytest.raises(ValueError, match="two tasks have one name, of gsm8k, gsm8k; take one of them"):
        tasks_named(names)


def test_each_difficulty_has_the_seeds_from_the_first_on():
    task = TASKS["arithmetic"]
    assert list(in_turn(task, 5, (3, 1), 7)) == [(7, 3), (7, 1), (8, 3), (8, 1), (9, 3)]
    assert list(in_turn(task, 8, (), 0)) == [(0, level) for level in range(1, 7)] + [(1, 1), (1, 2)]


def test_a_mixture_has_its_shares_at_any_order_of_names():
    weights = {"arithmetic": 3.0, "extraction": 1.0}
    picked = [pick(weights, seed) for seed in range(2000)]
    assert abs(picked.count("arithmetic") / 2000 - 0.75) < 0.03
    assert picked == [pick(dict(reversed(weights.items())), seed) for seed in range(2000)]
    for wrong in ({}, {"arithmetic": 0.0}, {"arithmetic": 1.0, "extraction": float("nan")}):
        with pytest.raises(ValueError, match="expected names with positive weights, got"):
            pick(wrong, 0)
