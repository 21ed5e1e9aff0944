"""The numbers game: every attempt is true, difficulties are counted by brute force, searches have no last length."""

import collections
import itertools
import re
import statistics

import pytest

from data_pipelines.tasks.numbers_game import NumbersGame

TASK = NumbersGame()
SAMPLES = [TASK.sample(seed, level, split) for level in (1, 2) for seed in range(150) for split in ("train", "held_out")]
ROUGH = [TASK.rough_text(seed, 2) for seed in range(2500)]


def ways(numbers, target):
    """Sums, differences and products of two of the numbers that make the target, by trying all; order within a pair is none."""
    tried = {(tuple(sorted(pair)), kind) for pair in itertools.permutations(numbers, 2) for kind in "+-*"}
    made = {"+": sum, "-": lambda pair: pair[1] - pair[0], "*": lambda pair: pair[0] * pair[1]}
    return sum(made[kind](pair) == target for pair, kind in tried)


def lines(text):
    """(left, operation, right, result, verdict) of each attempt, and that it is written as one."""
    found = [re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+) (low|high|yes)", line) for line in text.split("\n")]
    return [(int(line[1]), line[2], int(line[3]), int(line[4]), line[5]) for line in found]


def check(text, numbers, target):
    for left, kind, right, result, verdict in lines(text):
        assert eval(f"{left}{kind}{right}") == result
        assert verdict == ("yes" if result == target else "low" if result < target else "high")
        assert not collections.Counter([left, right]) - collections.Counter(numbers)


def test_difficulties_are_the_number_of_right_attempts():
    for number, problem in enumerate(SAMPLES):
        found = ways(**problem.reference)
        assert found == 1 if number >= 300 else found > 1
        numbers, target = problem.messages[0]["content"].split(" -> ")
        assert ([int(each) for each in numbers.split()], int(target)) == tuple(problem.reference.values())


def test_a_solution_is_true_tries_nothing_twice_and_stops_when_it_is_right():
    for problem in SAMPLES:
        check(problem.solution, **problem.reference)
        attempts = [(tuple(sorted(line[::2][:2])), line[1]) for line in lines(problem.solution)]
        assert len(set(attempts)) == len(attempts)
        assert [line[4] for line in lines(problem.solution)].count("yes") == 1


def test_a_rough_search_is_true_repeats_itself_and_ends_with_what_is_right():
    again = 0
    for text in ROUGH:
        question, _, search = text.partition("\n")
        numbers, target = question.split(" -> ")
        check(search, [int(each) for each in numbers.split()], int(target))
        assert [line[4] for line in lines(search)].index("yes") == search.count("\n")
        again += len(set(search.split("\n"))) <= search.count("\n")
    assert 0.3 < again / len(ROUGH) < 0.9


def test_no_length_of_a_rough_search_is_the_last_one():
    """Of those that have so many attempts, about as many end with the next, whatever the number: a geometric distribution. A
    model that could learn a greatest length would stop there and never loop."""
    lengths = [text.count("\n") for text in ROUGH]
    assert 7 < statistics.mean(lengths) < 13 and max(lengths) > 40
    hazards = [sum(length == n for length in lengths) / sum(length >= n for length in lengths) for n in range(2, 20)]
    assert max(hazards) < 0.17 and min(hazards) > 0.04


def test_questions_in_another_order_are_of_one_split():
    asked = {
        split: {
            (tuple(sorted(problem.reference["numbers"])), problem.reference["target"])
            for problem in (TASK.sample(seed, level, split) for seed in range(400) for level in (1, 2))
        }
        for split in ("train", "held_out")
    }
    assert not asked["train"] & asked["held_out"] and min(map(len, asked.values())) > 250


REFERENCE = {"numbers": [3, 7, 12, 5], "target": 84}


@pytest.mark.parametrize(
    ("response", "correct", "form"),
    [
        ("3+5=8 low\n12*7=84 yes", 1, 1),
        ("7*12=84 yes", 1, 1),
        ("7*12=84 yes\n", 1, 1),
        ("let me see\n7*12=84 yes", 1, 0),
        ("12*7=84 yes\n12*7=84 yes", 1, 0),  # it went on after it was right
        ("3+5=9 low\n12*7=84 yes", 1, 1),  # in form, though untrue on the way
        ("12*7=84 high", 0, 0),  # and does not know it
        ("12*7=84 yes\n3+5=8 low", 0, 0),
        ("12*5=84 yes", 0, 1),
        ("42*2=84 yes", 0, 1),
        ("12*12=84 yes", 0, 1),
        ("12*7=85 yes", 0, 1),
        ("12*7 = 84 yes", 0, 0),
        ("1٢*7=84 yes", 0, 0),
        ("__import__('os')*7=84 yes", 0, 0),
    ],
)
def test_what_is_right_and_what_is_in_form(response, correct, form):
    assert TASK.score(response, REFERENCE) == {"correct": correct, "format": form}


def test_a_number_given_once_is_used_once_and_twice_if_it_is_there_twice():
    assert TASK.score("6*6=36 yes", {"numbers": [6, 1, 2, 6], "target": 36})["correct"] == 1
    assert TASK.score("6*6=36 yes", {"numbers": [6, 1, 2, 7], "target": 36})["correct"] == 0
