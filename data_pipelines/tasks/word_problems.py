"""Word problems by templates: stories with numbers, a question, worked reasoning, and sentences that do not matter."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from data_pipelines.tasks.answers import score_number
from data_pipelines.tasks.task import Problem, Scores, Split, draw

_NAMES = (
    "Amara", "Ben", "Chloe", "Diego", "Elif", "Farid", "Grace", "Hana", "Ivan", "Jonas", "Kemi", "Lucia", "Mateo", "Nadia",
    "Omar", "Priya", "Quentin", "Rosa", "Samir", "Tomas", "Uma", "Viktor", "Wei", "Yara", "Zoe",
)  # fmt: skip
_GOODS = ("notebooks", "apples", "pencils", "stickers", "marbles", "postcards", "oranges", "buttons", "candles", "mugs")
_THINGS = ("coat", "bicycle", "lamp", "tent", "radio", "chair")
_PLACES = ("the market", "the library", "the station", "the school", "the harbour", "the museum")
_FORM = 'Reason step by step, and end with a line "Answer: N", where N is a number without a unit.'
# How large the numbers of a difficulty get.
_LARGEST = {1: 12, 2: 30, 3: 90, 4: 400}


@dataclasses.dataclass(frozen=True)
class Story:
    """facts: sentences. question: the last one. steps: the reasoning, a line each. answer: the number, as it is written.

    numbers: all that the answer follows from, in their order: with the kind of story they are its content.
    """

    facts: list[str]
    question: str
    steps: list[str]
    answer: str
    numbers: tuple[int, ...]


class WordProblems:
    """Stories of ten kinds.

    Difficulties: 1 one step and small numbers, 2 two steps, 3 three or more and a sentence that does not matter, 4 the same with
    larger numbers and two such sentences.
    """

    name = "word_problems"
    max_difficulty = 4

    def sample(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Task.sample`. The content is the kind of story and its numbers: names, goods and places do not count."""

        def make(rng: random.Random) -> tuple[Problem, Any]:
            kind = rng.choice(KINDS)
            names = rng.sample(_NAMES, 4)
            story = kind(rng, difficulty, names)
            facts = list(story.facts)
            for other in names[2 : 2 + max(0, difficulty - 2)]:
                facts.insert(rng.randrange(1, len(facts) + 1), _beside_the_point(rng, other))
            problem = Problem(
                messages=[{"role": "user", "content": f"{' '.join([*facts, story.question])}\n\n{_FORM}"}],
                reference=story.answer,
                solution="\n".join([*story.steps, f"Answer: {story.answer}"]),
            )
            return problem, [kind.__name__, *story.numbers]

        return draw(self, seed, difficulty, split, make)

    def score(self, response: str, reference: str) -> Scores:
        """See `score_number`."""
        return score_number(response, reference)


def _beside_the_point(rng: random.Random, name: str) -> str:
    n = rng.randrange(2, 60)
    return rng.choice((
        f"{name}, who lives next door, is {n + 4} years old.",
        f"It takes {name} {n} minutes to walk to {rng.choice(_PLACES)}.",
        f"Yesterday {name} read {n} pages of a book about ships.",
        f"{name} has kept a diary for {n} weeks.",
        f"There are {n} steps up to the flat of {name}.",
    ))  # fmt: skip


def _number(rng: random.Random, difficulty: int) -> int:
    return rng.randrange(3, _LARGEST[difficulty] + 1)


def _money(cents: int) -> str:
    """Without the currency; with cents only where there are any."""
    return f"{cents // 100}.{cents % 100:02}" if cents % 100 else str(cents // 100)


def _shopping(rng: random.Random, difficulty: int, names: list[str]) -> Story:
    name, (first, second) = names[0], rng.sample(_GOODS, 2)
    many, more = rng.randrange(2, 10), rng.randrange(2, 10)
    prices = [100 * _number(rng, difficulty) + (rng.choice((0, 25, 50, 75)) if difficulty > 2 else 0) for _ in range(2)]
    facts = [f"{name} buys {many} {first} at ${_money(prices[0])} each."]
    total = many * prices[0]
    steps = [f"The {first} cost {many} * {_money(prices[0])} = {_money(total)} dollars."]
    question, numbers = f"How many dollars does {name} pay?", [many, prices[0]]
    if difficulty >= 2:
        other = more * prices[1]
        facts.append(f"{name} also buys {more} {second} at ${_money(prices[1])} each.")
        steps += [
            f"The {second} cost {more} * {_money(prices[1])} = {_money(other)} dollars.",
            f"Together that is {_money(total)} + {_money(other)} = {_money(total + other)} dollars.",
        ]
        total, numbers = total + other, [*numbers, more, prices[1]]
    if difficulty >= 3:
        paid = (total // 10000 + 1) * 10000
        facts.append(f"{name} pays with ${paid // 100}.")
        question = f"How many dollars does {name} get back?"
        steps.append(f"{name} gets back {paid // 100} - {_money(total)} = {_money(paid - total)} dollars.")
        total, numbers = paid - total, [*numbers, paid]
    return Story(facts, question, steps, _money(total), tuple(numbers))


def _boxes(rng: random.Random, difficulty: int, names: list[str]) -> Story:
    name, goods = names[0], rng.choice(_GOODS)
    size, full, left = rng.randrange(3, 13), _number(rng, difficulty), 0
    if difficulty == 1:
        facts = [f"{name} puts {size * full} {goods} into boxes of {size}."]
        steps = [f"{size * full} / {size} = {full}, so there are {full} boxes."]
        return Story(facts, f"How many boxes does {name} fill?", steps, str(full), (size, size * full))
    left = rng.randrange(1, size)
    found = size * full + left
    own = rng.randrange(1, found)
    facts = [
        f"{name} has {own} {goods} and gets {found - own} more.",
        f"They go into boxes of {size}, as many full boxes as possible.",
    ]
    steps = [
        f"{name} has {own} + {found - own} = {found} {goods}.",
        f"{found} / {size} = {full} remainder {left}, so there are {full} full boxes and {left} {goods} are left over.",
    ]
    if difficulty == 2:
        return Story(facts, f"How many {goods} are left over?", steps, str(left), (size, own, found))
    price = rng.randrange(2, 20)
    facts.append(f"Each full box is sold for ${price}.")
    steps.append(f"The full boxes bring {full} * {price} = {full * price} dollars.")
    return Story(facts, "How many dollars do the full boxes bring?", steps, str(full * price), (size, own, found, price))


def _journey(rng: random.Random, difficulty: int, names: list[str]) -> Story:
    name, place = names[0], rng.choice(_PLACES)
    speed, hours = 10 * rng.randrange(2, 10) + (rng.randrange(10) if difficulty > 2 else 0), rng.randrange(2, 9)
    facts = [f"{name} drives towards {place} for {hours} hours at {speed} kilometres per hour."]
    distance = speed * hours
    steps = [f"In {hours} hours at {speed} kilometres per hour {name} drives {hours} * {speed} = {distance} kilometres."]
    if difficulty == 1:
        return Story(facts, f"How many kilometres does {name} drive?", steps, str(distance), (speed, hours))
    second, more = 10 * rng.randrange(2, 10), rng.randrange(2, 9)
    facts.append(f"Then {name} drives for {more} hours at {second} kilometres per hour.")
    total = distance + more * second
    steps += [
        f"Then {name} drives {more} * {second} = {more * second} kilometres.",
        f"In all that is {distance} + {more * second} = {total} kilometres.",
    ]
    if difficulty == 2:
        return Story(facts, f"How many kilometres does {name} drive in all?", steps, str(total), (speed, hours, second, more))
    whole = total + _number(rng, difficulty)
    facts.append(f"The whole way is {whole} kilometres.")
    steps.append(f"There remain {whole} - {total} = {whole - total} kilometres.")
    question = "How many kilometres of the way remain?"
    return Story(facts, question, steps, str(whole - total), (speed, hours, second, more, whole))


def _comparison(rng: random.Random, difficulty: int, names: list[str]) -> Story:
    (name, other), goods = names[:2], rng.choice(_GOODS)
    n, times = _number(rng, difficulty), rng.randrange(2, 7)
    facts = [f"{name} has {n} {goods}.", f"{other} has {times} times as many {goods} as {name}."]
    steps = [f"{other} has {times} * {n} = {times * n} {goods}."]
    if difficulty == 1:
        return Story(facts, f"How many {goods} does {other} have?", steps, str(times * n), (n, times))
    total = n + times * n
    steps.append(f"Together they have {n} + {times * n} = {total} {goods}.")
    if difficulty == 2:
        return Story(facts, f"How many {goods} do they have together?", steps, str(total), (n, times))
    given = rng.randrange(1, total)
    facts.append(f"Together they give away {given} {goods}.")
    steps.append(f"Then they have {total} - {given} = {total - given} {goods}.")
    return Story(facts, f"How many {goods} do they have together then?", steps, str(total - given), (n, times, given))


def _discount(rng: random.Random, difficulty: int, names: list[str]) -> Story:
    name, goods = names[0], rng.choice(_THINGS)
    percent, price = 5 * rng.randrange(1, 15), 20 * _number(rng, difficulty)
    off = price * percent // 100
    facts = [f"{name} looks at a {goods} that costs ${price}.", f"In the sale it is {percent}% cheaper."]
    steps = [f"{percent}% of {price} is {price} * {percent} / 100 = {off} dollars."]
    if difficulty == 1:
        return Story(facts, f"By how many dollars is the {goods} cheaper?", steps, str(off), (price, percent))
    steps.append(f"In the sale the {goods} costs {price} - {off} = {price - off} dollars.")
    if difficulty == 2:
        return Story(facts, f"How many dollars does the {goods} cost in the sale?", steps, str(price - off), (price, percent))
    months = rng.choice([months for months in (2, 4, 5, 8, 10) if (price - off) * 100 % months == 0])
    each = (price - off) * 100 // months
    facts.append(f"{name} buys it in the sale and pays in {months} equal parts.")
    steps.append(f"Each part is {price - off} / {months} = {_money(each)} dollars.")
    return Story(facts, "How many dollars is each part?", steps, _money(each), (price, percent, months))


def _share(rng: random.Random, difficulty: int, names: list[str]) -> Story:
    below = rng.randrange(2, 9)
    above, whole = rng.randrange(1, below), below * _number(rng, difficulty)
    part = whole // below * above
    facts = [f"A club has {whole} members.", f"Of them {above}/{below} come to the meeting."]
    steps = [f"{above}/{below} of {whole} is {whole} / {below} * {above} = {part} members."]
    if difficulty == 1:
        return Story(facts, "How many members come?", steps, str(part), (whole, above, below))
    steps.append(f"So {whole} - {part} = {whole - part} members do not come.")
    if difficulty == 2:
        return Story(facts, "How many members do not come?", steps, str(whole - part), (whole, above, below))
    guests = _number(rng, difficulty)
    facts.append(f"{names[0]} brings {guests} guests to the meeting, who are no members.")
    steps[1] = f"With the guests {part} + {guests} = {part + guests} people come."
    dollars = rng.randrange(2, 9)
    facts.append(f"Everyone who comes pays ${dollars} for dinner.")
    steps.append(f"They pay {part + guests} * {dollars} = {(part + guests) * dollars} dollars.")
    question = "How many dollars do they pay together?"
    return Story(facts, question, steps, str((part + guests) * dollars), (whole, above, below, guests, dollars))


def _machine(rng: random.Random, difficulty: int, names: list[str]) -> Story:
    goods, rate, minutes = rng.choice(_GOODS), _number(rng, difficulty), rng.randrange(2, 60)
    facts = [f"A machine packs {rate} {goods} a minute."]
    if difficulty == 1:
        steps = [f"In {minutes} minutes it packs {minutes} * {rate} = {minutes * rate} {goods}."]
        facts.append(f"It runs for {minutes} minutes.")
        return Story(facts, f"How many {goods} does it pack?", steps, str(minutes * rate), (rate, minutes))
    hours = rng.randrange(2, 7)
    time = 60 * hours + minutes
    facts.append(f"{names[0]} lets it run for {hours} hours and {minutes} minutes.")
    steps = [
        f"{hours} hours and {minutes} minutes are {hours} * 60 + {minutes} = {time} minutes.",
        f"In that time it packs {time} * {rate} = {time * rate} {goods}.",
    ]
    if difficulty == 2:
        return Story(facts, f"How many {goods} does it pack?", steps, str(time * rate), (rate, hours, minutes))
    broken = rng.randrange(1, time * rate)
    facts.append(f"Of all that it packs, {broken} break.")
    steps.append(f"{time * rate} - {broken} = {time * rate - broken} {goods} are whole.")
    return Story(facts, f"How many {goods} are whole?", steps, str(time * rate - broken), (rate, hours, minutes, broken))


def _garden(rng: random.Random, difficulty: int, names: list[str]) -> Story:
    long, wide = _number(rng, difficulty), _number(rng, difficulty)
    facts = [f"The garden of {names[0]} is {long} metres long and {wide} metres wide."]
    if difficulty == 1:
        steps = [f"The area is {long} * {wide} = {long * wide} square metres."]
        return Story(facts, "How many square metres is its area?", steps, str(long * wide), (long, wide))
    around = 2 * (long + wide)
    steps = [
        f"Length and width are {long} + {wide} = {long + wide} metres.",
        f"All around it is 2 * {long + wide} = {around} metres.",
    ]
    facts.append("A fence goes all around it.")
    if difficulty == 2:
        return Story(facts, "How many metres long is the fence?", steps, str(around), (long, wide))
    gate, price = rng.randrange(1, 4), rng.randrange(3, 30)
    facts = [*facts, f"It leaves out a gate of {gate} metres.", f"A metre of fence costs ${price}."]
    steps.append(f"Without the gate the fence is {around} - {gate} = {around - gate} metres long.")
    steps.append(f"It costs {around - gate} * {price} = {(around - gate) * price} dollars.")
    return Story(facts, "How many dollars does the fence cost?", steps, str((around - gate) * price), (long, wide, gate, price))


def _average(rng: random.Random, difficulty: int, names: list[str]) -> Story:
    days, mean = min(difficulty + 1, 4), _number(rng, difficulty) + 10
    shifts = [rng.randrange(-9, 10) for _ in range(days - 1)]
    values = [mean + shift for shift in shifts]
    last = mean - sum(shifts)
    if last < 0:  # the others are far above the mean: they go as far below it
        values, last = [2 * mean - value for value in values], 2 * mean - last
    listed = " + ".join(map(str, [*values, last]))
    total = mean * days
    if difficulty <= 2:
        facts = [f"{names[0]} counts the boats on {days} days: {', '.join(map(str, values))} and {last}."]
        steps = [f"In all that is {listed} = {total} boats.", f"The mean is {total} / {days} = {mean} boats a day."]
        return Story(facts, "How many boats a day is the mean?", steps, str(mean), (*values, last))
    facts = [
        f"{names[0]} counts the boats on {days} days, {mean} a day on average.",
        f"On all days but the last it is {', '.join(map(str, values[:-1]))} and {values[-1]} boats.",
    ]
    known = sum(values)
    steps = [
        f"In {days} days {names[0]} counts {days} * {mean} = {total} boats.",
        f"On all days but the last it is {' + '.join(map(str, values))} = {known} boats.",
        f"On the last day it is {total} - {known} = {last} boats.",
    ]
    return Story(facts, f"How many boats does {names[0]} count on the last day?", steps, str(last), (mean, *values))


def _ages(rng: random.Random, difficulty: int, names: list[str]) -> Story:
    name, other = names[:2]
    age, older, years = rng.randrange(4, 20), rng.randrange(2, 9 * difficulty + 12), rng.randrange(2, 9 * difficulty + 6)
    facts = [f"{name} is {age} years old.", f"{other} is {older} years older than {name}."]
    steps = [f"{other} is {age} + {older} = {age + older} years old."]
    if difficulty == 1:
        return Story(facts, f"How old is {other}?", steps, str(age + older), (age, older))
    steps.append(f"In {years} years {other} is {age + older} + {years} = {age + older + years} years old.")
    if difficulty == 2:
        return Story(facts, f"How old is {other} in {years} years?", steps, str(age + older + years), (age, older, years))
    both = age + years + age + older + years
    steps += [
        f"{name} is then {age} + {years} = {age + years} years old.",
        f"Together they are {age + older + years} + {age + years} = {both} years old.",
    ]
    return Story(facts, f"How many years old are they together in {years} years?", steps, str(both), (age, older, years))


KINDS: tuple[Callable[[random.Random, int, list[str]], Story], ...] = (
    _shopping, _boxes, _journey, _comparison, _discount, _share, _machine, _garden, _average, _ages,
)  # fmt: skip
