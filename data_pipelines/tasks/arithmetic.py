"""Arithmetic: expressions of whole numbers, worked out step by step as by hand, with carries, borrows and partial products."""

import random
from typing import Any

from data_pipelines.tasks.answers import score_number
from data_pipelines.tasks.task import Problem, Scores, Split, draw

# An expression: a number, or (operation, left, right).
Expression = int | tuple[str, "Expression", "Expression"]

_REQUESTS = (
    "Compute {}.",
    "What is {}?",
    "Work out {}.",
    "Find the value of {}.",
)
_FORM = 'Show each step, and end with a line "Answer: N", where N is the result.'


class Arithmetic:
    """Expressions. Difficulties: 1 a small sum, 2 a sum or difference of two or three digits, 3 a chain of them, 4 with a product
    by one digit, 5 with parentheses, 6 with a long multiplication or division.
    """

    name = "arithmetic"
    max_difficulty = 6

    def sample(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Task.sample`. The content is the expression, whatever the order of what is added or multiplied."""

        def make(rng: random.Random) -> tuple[Problem, Any]:
            expression = _expression(rng, difficulty)
            lines, result = solve(expression)
            request = rng.choice(_REQUESTS).format(write(expression))
            problem = Problem(
                messages=[{"role": "user", "content": f"{request} {_FORM}"}],
                reference=str(result),
                solution="\n".join([*lines, f"Answer: {result}"]),
            )
            return problem, _ordered(expression)

        return draw(self, seed, difficulty, split, make)

    def score(self, response: str, reference: str) -> Scores:
        """See `score_number`."""
        return score_number(response, reference)


def write(expression: Expression) -> str:
    """The expression, * and / for times and divided by; no two are written alike, so a sum on the right has parentheses."""
    if isinstance(expression, int):
        return str(expression)
    operation, left, right = expression
    before, after = write(left), write(right)
    if operation in "*/":
        before = f"({before})" if _is_sum(left) else before
        after = f"({after})" if not isinstance(right, int) else after
    elif _is_sum(right):
        after = f"({after})"
    return f"{before} {operation} {after}"


def solve(expression: Expression) -> tuple[list[str], int]:
    """(one line for each operation, the result). A division must leave no remainder."""
    if isinstance(expression, int):
        return [], expression
    operation, left, right = expression
    lines, a = solve(left)
    more, b = solve(right)
    work, result = {"+": _add, "-": _subtract, "*": _multiply, "/": _divide}[operation](a, b)
    return [*lines, *more, work], result


def _is_sum(expression: Expression) -> bool:
    return not isinstance(expression, int) and expression[0] in "+-"


def _ordered(expression: Expression) -> Any:
    """As a value of JSON, the same for a + b and b + a."""
    if isinstance(expression, int):
        return expression
    operation, left, right = expression
    sides = [_ordered(left), _ordered(right)]
    return [operation, *(sorted(sides, key=str) if operation in "+*" else sides)]


def _expression(rng: random.Random, difficulty: int) -> Expression:
    def n(*digits: int) -> int:
        count = rng.choice(digits)
        return rng.randrange(10 ** (count - 1) + (count == 1), 10**count)

    sign = lambda: rng.choice("+-")
    if difficulty == 1:
        return ("+", n(1, 2), n(1, 2))
    if difficulty == 2:
        return (sign(), *sorted((n(2, 3), n(2, 3)), reverse=True))
    if difficulty == 3:
        chain: Expression = n(2, 3)
        for _ in range(rng.randrange(2, 4)):
            chain = (sign(), chain, n(2, 3))
        return chain
    if difficulty == 4:
        product = ("*", n(2, 3), rng.randrange(2, 10))
        return (sign(), product, n(2, 3)) if rng.random() < 0.5 else (sign(), n(3, 4), product)
    if difficulty == 5:
        product = ("*", (sign(), n(2, 3), n(2)), rng.randrange(2, 10))
        return (sign(), product, (sign(), n(2, 3), n(2)) if rng.random() < 0.5 else n(3))
    divisor = rng.randrange(2, 10)
    hard = ("*", n(2, 3), n(2)) if rng.random() < 0.5 else ("/", divisor * n(3, 4), divisor)
    return (sign(), hard, ("*", n(2, 3), n(2)) if rng.random() < 0.5 else n(3, 4))


def _add(a: int, b: int) -> tuple[str, int]:
    if a < 0 and b < 0:
        work, result = _add(-a, -b)
        return f"{_pair(a, '+', b)} = -({-a} + {-b}). {work} With the sign: {-result}.", -result
    if a < 0 or b < 0:
        above, below = (b, -a) if a < 0 else (a, -b)
        work, result = _subtract(above, below)
        return f"{_pair(a, '+', b)} = {above} - {below}. {work}", result
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}.", a + b
    steps, carry, digits = [], 0, max(len(str(a)), len(str(b)))
    for at in range(digits):
        terms = [a // 10**at % 10, b // 10**at % 10] + [carry] * (carry > 0)
        total = sum(terms)
        carry = total // 10 if at < digits - 1 else 0
        write_down = f"write {total % 10}, carry 1" if carry else f"write {total}"
        steps.append(f"{' + '.join(map(str, terms))} = {total}, {write_down}")
    return f"{a} + {b}: {'; '.join(steps)}. So {a} + {b} = {a + b}.", a + b


def _subtract(a: int, b: int) -> tuple[str, int]:
    if b < 0:
        work, result = _add(a, -b)
        return f"{_pair(a, '-', b)} = {a} + {-b}. {work}", result
    if a < 0:
        work, result = _add(-a, b)
        return f"{a} - {b} = -({-a} + {b}). {work} With the sign: {-result}.", -result
    if a < b:
        work, result = _subtract(b, a)
        return f"{a} - {b} = -({b} - {a}). {work} With the sign: {-result}.", -result
    if a < 10:
        return f"{a} - {b} = {a - b}.", a - b
    steps, borrowed = [], 0
    for at in range(len(str(a))):
        above, below = a // 10**at % 10 - borrowed, b // 10**at % 10
        taken = f"{above + borrowed} - 1 = {above}, " if borrowed else ""
        borrowed = int(above < below)
        borrow = f"borrow: {above} + 10 = {above + 10}, " if borrowed else ""
        above += 10 * borrowed
        steps.append(f"{taken}{borrow}{above} - {below} = {above - below}")
    return f"{a} - {b}: {'; '.join(steps)}. So {a} - {b} = {a - b}.", a - b


def _multiply(a: int, b: int) -> tuple[str, int]:
    """b is positive, as `_expression` makes it."""
    if a < 0:
        work, result = _multiply(-a, b)
        return f"{a} * {b} = -({-a} * {b}). {work} With the sign: {-result}.", -result
    if a < 10 and b < 10:
        return f"{a} * {b} = {a * b}.", a * b
    if b < 10:
        parts = [int(digit) * 10**at for at, digit in enumerate(reversed(str(a))) if digit != "0"][::-1] or [0]
        products = ", ".join(f"{part} * {b} = {part * b}" for part in parts)
        return f"{a} * {b}: {products}{_running_sum([part * b for part in parts])}. So {a} * {b} = {a * b}.", a * b
    parts = [int(digit) * 10**at for at, digit in enumerate(reversed(str(b))) if digit != "0"][::-1]
    lines = [_multiply(a, int(str(part)[0]))[0] + f" So {a} * {part} = {a * part}." * (part >= 10) for part in parts]
    split = f"{a} * {b} = {' + '.join(f'{a} * {part}' for part in parts)}. " * (len(parts) > 1)
    total = _running_sum([a * part for part in parts]).removeprefix("; ")
    return f"{split}{' '.join(lines)}{f' {total}.' * bool(total)}", a * b


def _running_sum(terms: list[int]) -> str:
    text, total = "", terms[0]
    for term in terms[1:]:
        text += f"; {total} + {term} = {total + term}"
        total += term
    return text


def _divide(a: int, b: int) -> tuple[str, int]:
    """b is one digit and divides a, which is positive."""
    steps, rest = [], 0
    for digit in str(a):
        rest = rest * 10 + int(digit)
        steps.append(f"{rest} / {b} = {rest // b} remainder {rest % b}")
        rest %= b
    return f"{a} / {b}: {'; '.join(steps)}. So {a} / {b} = {a // b}.", a // b


def _pair(a: int, operation: str, b: int) -> str:
    return f"{a} {operation} {f'({b})' if b < 0 else b}"
