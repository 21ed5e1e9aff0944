"""Worked arithmetic: every equation in a solution holds, the digits that are written down are the result, and splits hold."""

import re
from fractions import Fraction

import pytest

from data_pipelines.tasks.arithmetic import Arithmetic, solve, write

TASK = Arithmetic()
SAMPLES = [TASK.sample(seed, level, split) for level in range(1, 7) for seed in range(80) for split in ("train", "held_out")]
EXPRESSION = re.compile(r"(?:Compute|What is|Work out|Find the value of) (.*?)[.?] Show")


def asked(problem):
    return EXPRESSION.match(problem.messages[-1]["content"])[1]


def value(text: str) -> Fraction:
    """Of an expression as Python has it, in exact numbers."""
    assert re.fullmatch(r"[-+*/() 0-9.]+", text), text
    return eval(re.sub(r"[0-9.]+", lambda number: f"Fraction('{number[0]}')", text), {"Fraction": Fraction})


def equations(text: str):
    """The sides of each chain of equations in a worked solution."""
    for piece in re.split(r"[;:,]|\.(?=\s|$)|\n", text):
        piece = re.sub(r"^[A-Za-z ]+(?=[-(0-9])", "", piece.strip())
        if "=" in piece:
            yield [side.strip() for side in piece.split("=")]


def holds(sides: list[str]) -> bool:
    if found := re.fullmatch(r"(\d+) remainder (\d+)", sides[-1]):
        above, below = map(int, sides[0].split(" / "))
        return divmod(above, below) == tuple(map(int, found.groups()))
    return len({value(side) for side in sides}) == 1


def test_results_and_every_step_are_right():
    for problem in SAMPLES:
        assert Fraction(problem.reference) == value(asked(problem))
        found = list(equations(problem.solution))
        assert found and all(holds(sides) for sides in found), problem.solution


def test_the_digits_that_are_written_down_are_the_result():
    sums = differences = 0
    for line in "\n".join(problem.solution for problem in SAMPLES).splitlines():
        for a, operation, b, work in re.findall(r"(\d+) ([-+]) (\d+): (.*?)\. So", line):
            if operation == "+":
                digits = re.findall(r"write (\d+)", work)
                carries = [int("carry" in step) for step in re.split(r"; ", work)]
                columns = re.findall(r"((?:\d \+ )+\d) = (\d+), write", work)
                assert [column.count("+") for column, _ in columns[1:]] == [1 + carry for carry in carries[:-1]], line
                sums += 1
            else:
                digits = re.findall(r"(\d+) - \d = (\d)(?:;|$)", work)
                digits = [digit for _, digit in digits]
                differences += 1
            assert int("".join(reversed(digits))) == (int(a) + int(b) if operation == "+" else int(a) - int(b)), line
    assert sums > 100 and differences > 100


@pytest.mark.parametrize(
    ("expression", "text", "result"),
    [
        (("-", 5, ("-", 3, 9)), "5 - (3 - 9)", 11),
        (("*", ("-", 3, 9), 4), "(3 - 9) * 4", -24),
        (("+", ("*", 12, 34), ("/", 84, 7)), "12 * 34 + 84 / 7", 420),
        (("-", ("-", 10, 20), 30), "10 - 20 - 30", -40),
        (("+", 3, ("+", 4, 5)), "3 + (4 + 5)", 12),
        (("-", 1000, 1), "1000 - 1", 999),
        (("*", 205, 30), "205 * 30", 6150),
    ],
)
def test_expressions_as_they_are_written(expression, text, result):
    lines, found = solve(expression)
    assert (write(expression), found) == (text, result)
    assert value(text) == result and all(holds(sides) for sides in equations("\n".join(lines)))


def test_every_small_sum_difference_and_product():
    for a in range(-120, 121, 7):
        for b in range(-120, 121, 11):
            for operation in "+-":
                lines, result = solve((operation, a, b))
                assert result == (a + b if operation == "+" else a - b)
                assert all(holds(sides) for sides in equations(lines[0])), lines
            if b > 0:
                lines, result = solve(("*", a, b))
                assert result == a * b and all(holds(sides) for sides in equations(lines[0])), lines


def test_a_sum_is_of_one_split_in_either_order():
    pairs = {"train": set(), "held_out": set()}
    for split, found in pairs.items():
        for level in (1, 2):
            for seed in range(500):
                expression = asked(TASK.sample(seed, level, split))
                found.add(tuple(sorted(expression.split())))
    assert not pairs["train"] & pairs["held_out"]


def test_more_digits_and_operations_are_longer():
    lengths = [sum(len(problem.solution) for problem in SAMPLES[at : at + 160]) for at in range(0, len(SAMPLES), 160)]
    assert lengths[0] < lengths[1] < min(lengths[2:5]) and max(lengths) == lengths[5]
