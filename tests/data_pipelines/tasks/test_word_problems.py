"""Word problems: reasoning that holds and needs no number that was not given, splits by numbers; and the file of GSM8K."""

import json
import random
import re
from fractions import Fraction

import pytest

from data_pipelines.tasks import task_named
from data_pipelines.tasks.gsm8k import Gsm8k
from data_pipelines.tasks.word_problems import _GOODS, _NAMES, _PLACES, _THINGS, KINDS, WordProblems

TASK = WordProblems()
SAMPLES = [
    (level, TASK.sample(seed, level, split)) for level in range(1, 5) for seed in range(120) for split in ("train", "held_out")
]
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
EQUATION = re.compile(rf"((?:{NUMBER})(?: [-+*/] {NUMBER})+) = ({NUMBER})(?: remainder ({NUMBER}))?")
# Minutes of an hour, per cent, and the sides of a rectangle.
KNOWN = {60, 100, 2}


def value(text: str) -> Fraction:
    return eval(re.sub(NUMBER, lambda number: f"Fraction('{number[0]}')", text), {"Fraction": Fraction})


def check(steps: list[str], answer: str, asked: str):
    """Each step is an equation that holds, of numbers that were asked about or found before; the last has the answer."""
    known = {Fraction(number) for number in re.findall(NUMBER, asked)} | KNOWN
    for step in steps:
        found = EQUATION.findall(step)
        assert len(found) == 1, step
        ((left, right, rest),) = found
        assert {Fraction(number) for number in re.findall(NUMBER, left)} <= known, (step, asked)
        if rest:
            above, below = map(int, left.split(" / "))
            assert divmod(above, below) == (int(right), int(rest)), step
        else:
            assert value(left) == Fraction(right), step
        known |= {Fraction(number) for number in (right, rest) if number}
    assert Fraction(answer) in {Fraction(number) for number in (right, rest) if number}


def test_every_step_is_right_and_leads_to_the_answer():
    for _, problem in SAMPLES:
        *steps, last = problem.solution.splitlines()
        assert last == f"Answer: {problem.reference}"
        check(steps, problem.reference, problem.messages[-1]["content"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_story_is_right_at_every_difficulty(kind):
    for level in range(1, 5):
        for seed in range(60):
            story = kind(random.Random(seed), level, ["Ada", "Bo", "Cy", "Di"])
            check(story.steps, story.answer, " ".join([*story.facts, story.question]))


def test_harder_is_longer():
    lengths = [sum(len(problem.solution.splitlines()) for at, problem in SAMPLES if at == level) for level in range(1, 5)]
    assert lengths[0] < lengths[1] < lengths[2]
    questions = [[problem.messages[-1]["content"] for at, problem in SAMPLES if at == level] for level in (2, 3, 4)]
    sentences = [sum(question.count(". ") for question in of_level) for of_level in questions]
    assert sentences == sorted(sentences)


def test_the_same_numbers_are_of_one_split_whatever_the_names():
    words = re.compile("|".join([*_NAMES, *_GOODS, *_THINGS, *_PLACES]))
    skeletons = {"train": set(), "held_out": set()}
    for split, found in skeletons.items():
        for level in range(1, 5):
            found |= {words.sub("", TASK.sample(seed, level, split).solution) for seed in range(250)}
    assert not skeletons["train"] & skeletons["held_out"]
    assert len(skeletons["held_out"]) > 500


@pytest.fixture(scope="module")
def gsm8k(published_data):
    return Gsm8k(published_data / "gsm8k" / "train.jsonl")


def test_gsm8k_is_read_as_it_was_published(gsm8k, published_data):
    rows = [json.loads(line) for line in (published_data / "gsm8k" / "train.jsonl").read_text().splitlines()]
    by_question = {row["question"]: row["answer"] for row in rows}
    found = [problem for problems in gsm8k._problems.values() for problem in problems]
    assert len(found) == len(rows) == 7473
    for problem in found:
        question = problem.messages[-1]["content"].rpartition("\n\n")[0]
        answer = by_question[question].split("#### ")[1].replace(",", "")
        assert problem.reference == str(Fraction(answer))
        assert "<<" not in problem.solution and "####" not in problem.solution
        assert gsm8k.score(problem.solution, problem.reference) == {"correct": 1, "format": 1}
        assert gsm8k.score("", problem.reference) == {"correct": 0, "format": 0}
    held_out = sum(len(problems) for (_, split), problems in gsm8k._problems.items() if split == "held_out")
    assert 0.11 < held_out / len(rows) < 0.14


def test_gsm8k_difficulty_is_the_number_of_calculations(gsm8k):
    for level in range(1, 6):
        sample = gsm8k.sample(0, level)
        assert len(re.findall(r" = |=", sample.solution)) >= level
    assert gsm8k.sample(5, 2) == gsm8k.sample(5, 2)


def test_gsm8k_gives_each_problem_once_an_epoch(gsm8k):
    count = len(gsm8k._problems[6, "held_out"])
    epochs = [[gsm8k.sample(seed, 6, "held_out").solution for seed in range(at * count, (at + 1) * count)] for at in range(2)]
    assert len(set(epochs[0])) == count and set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]


def test_gsm8k_counts_a_percent_sign_as_a_unit(gsm8k):
    answers = {"25": 1, "25%": 1, "$25": 1, "25\\%": 1, "25 %": 1, "0.25": 0, "2500%": 0}
    assert {answer: gsm8k.score(f"Answer: {answer}", "25")["correct"] for answer in answers} == answers


@pytest.mark.parametrize(
    "line",
    [
        "[]", "{}", "no JSON", '{"question": "How many?", "answer": "Five."}',
        '{"question": "How many?", "answer": "So\\n#### five"}', '{"question": 1, "answer": "So\\n#### 5"}',
        "[" * 100_000, '{"question": "\\ud800", "answer": "So\\n#### 5"}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_problem_is_named(tmp_path, line):
    good = json.dumps({"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"})
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match='bad.jsonl, line 2: expected an object with "question" and "answer", .*, got .*'):
        Gsm8k(tmp_path / "bad.jsonl")


def test_a_difficulty_without_problems_is_refused(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}))
    task = task_named(f"gsm8k:{tmp_path / 'one.jsonl'}")
    for level, split in ((2, "train"), (7, "train"), (1, "test")):
        with pytest.raises(ValueError, match=f"gsm8k has difficulties 1 to 6 and .*; none of {level}, '{split}'"):
            task.sample(0, level, split)
