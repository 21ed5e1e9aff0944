"""Environments of several turns: tools out of methods, turns that never raise, and a shop whose every problem is solved."""

import copy
import enum
import json
import random
import typing
from typing import Any, Literal, Optional, Union

import jsonschema
import pytest

from data_pipelines.tasks.multi_turn import Step, Turns, fits, tool_methods, tool_schema
from data_pipelines.tasks.shop import Shop, solve
from data_pipelines.tasks.tool_calls import Call, parse, write

PLACES = [(difficulty, seed) for difficulty in range(1, 6) for seed in range(30)]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Kit:
    """Tools with every kind of argument, one that fails and two that are none."""

    def everything(
        self,
        text: str,
        whole: int,
        number: float,
        flag: bool,
        words: list[str],
        pair: tuple[int, str],
        table: dict[str, list[int]],
        anything: Any,
        one_of: Literal["a", "b"],
        some: Literal[1, "b"],
        colour: Colour,
        old: Optional[int],  # noqa: UP045
        either: Union[int, str],  # noqa: UP007
        nested: list[int] | dict[str, int] | None = None,
        plain: list = (),
        older: typing.List = (),  # noqa: UP006
        mapping: dict | None = None,
        choice: str = "x",
    ) -> str:
        """Does everything.

        In two paragraphs: this is the second.

        Args:
            text: A text,
                in two lines: with a colon.
            whole: An integer.
            number: A number.
            flag: A flag.
            words: Words.
            pair: A pair.
            table: A table.
            anything: Anything.
            one_of: One of two.
            some: One of two types.
            colour: A colour.
            old: May be null.
            either: One or the other.
            nested: Nested.
            plain: Plain.
            older: Older.
            mapping: Mapping.
            choice: A choice (choices: ["x", "y"])

        Returns:
            A text: always the same.
        """
        return "text"

    def fail(self, how: str) -> None:
        """Fails.

        Args:
            how: Its message.
        """
        raise KeyError(how) if how else ZeroDivisionError

    def rows(self, count: int = 2) -> list[dict]:
        """Returns rows.

        Args:
            count: How many.
        """
        return [{"row": row, "of": {1}} for row in range(count)]

    async def later(self) -> str:
        """Returns a text, later."""
        return "later"

    def _hidden(self) -> None: ...

    @staticmethod
    def helper() -> None: ...


def turns(most: int = 10) -> Turns:
    return Turns(tool_methods(Kit()), most)


def test_tools_are_the_public_methods():
    assert list(tool_methods(Kit())) == ["everything", "fail", "later", "rows"]
    assert list(tool_methods(Kit(), ("fail", "later"))) == ["everything", "rows"]


def test_schemas_are_those_of_transformers():
    transformers_utils = pytest.importorskip("transformers.utils")
    shop = Shop()
    shop.reset(0, 1)
    for tool in [*tool_methods(Kit()).values(), *shop._turns.tools.values()]:
        theirs = transformers_utils.get_json_schema(tool)
        theirs["function"].pop("return", None)
        assert tool_schema(tool) == theirs


def no_docstring(x: int): ...


def no_hint(x):
    """Says what it does.

    Args:
        x: A value.
    """


def no_description(x: int):
    """Says what it does."""


def no_json(x: set[int]):
    """Says what it does.

    Args:
        x: A value.
    """


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_docstring, "the tool no_docstring must have a docstring that says what it does"),
        (no_hint, "the argument 'x' of the tool no_hint must have a type hint"),
        (no_description, "the argument 'x' of the tool no_description must have a description under \"Args:\""),
        (no_json, r"no_json, argument 'x': a type hint must be one that JSON has .*, got set\[int\]"),
    ],
)
def test_a_tool_must_say_what_it_takes(function, message):
    with pytest.raises(ValueError, match=message):
        tool_schema(function)


VALUES = [None, True, False, 0, 1, -2, 1.0, 2.5, "", "a", "b", "x", "red", [], [1], ["a"], [1, "a"], [None], {}, {"a": 1}]
VALUES += [{"a": [1, 2]}, {"a": ["b"]}, {"a": "b"}]


def test_values_fit_as_jsonschema_says():
    properties = tool_schema(Kit().everything)["function"]["parameters"]["properties"]
    for key, schema in properties.items():
        published = copy.deepcopy(schema)
        nullable = published.pop("nullable", False)
        if "prefixItems" in published:
            # A tuple's schema says how many elements there are; ours and Python's are exact about it.
            published |= {"minItems": len(schema["prefixItems"]), "maxItems": len(schema["prefixItems"])}
        judge = jsonschema.Draft202012Validator(published)
        for value in VALUES:
            # 1.0 is an integer to JSON Schema; a tool of Python that takes an int is not given a float.
            if isinstance(value, float) and value.is_integer():
                continue
            assert fits(value, schema) == (judge.is_valid(value) or (value is None and nullable)), (key, value)
    assert not fits(1.0, {"type": "integer"}) and fits(1.0, {"type": "number"}) and fits(1, {"type": "number"})


@pytest.mark.parametrize(
    ("call", "content"),
    [
        ("rows()", '[{"row": 0, "of": "{1}"}, {"row": 1, "of": "{1}"}]'),
        ("rows(count=0)", "[]"),
        ("later()", "later"),
        ("rows(count='2')", "{\"error\": \"rows: count must be of type integer, got '2'\"}"),
        ("rows(count=True)", "{\"error\": \"rows: count must be of type integer, got 'True'\"}"),
        ("rows(size=2)", "{\"error\": \"rows has no argument 'size'\"}"),
        ("fail(x=1)", "{\"error\": \"fail has no argument 'x' and needs the argument 'how'\"}"),
        ("fail(how='badly')", "{\"error\": \"'badly'\"}"),
        ("fail(how='')", '{"error": "ZeroDivisionError"}'),
        ("_hidden()", "{\"error\": \"there is no tool '_hidden'; there are everything, fail, later, rows\"}"),
        ("helper()", "{\"error\": \"there is no tool 'helper'; there are everything, fail, later, rows\"}"),
        ("rows(count=2", '{"error": "the calls cannot be read: no list of calls:'),
        ("rows(2)", "{\"error\": \"the calls cannot be read: 'rows' has an argument without a name\"}"),
    ],
)
def test_every_call_gets_an_answer(call, content):
    episode = turns()
    step = episode.step(f"<|tool_call_start|>[{call}]<|tool_call_end|>")
    (message,) = step.messages
    assert not step.done and message["role"] == "tool"
    assert message["content"].startswith(content)
    malformed = "cannot be read" in content
    assert (episode.malformed, episode.calls, episode.failed) == (malformed, not malformed, not malformed and "error" in content)


def test_several_calls_in_a_turn_and_the_answer():
    episode = turns()
    assert episode.scores() == {"calls": None, "format": None}
    step = episode.step("Look. <|tool_call_start|>[rows(count=0), fail(how='x')]<|tool_call_end|>")
    assert [message["content"] for message in step.messages] == ["[]", "{\"error\": \"'x'\"}"]
    assert episode.step("<|tool_call_start|>").messages[0]["role"] == "tool"
    assert episode.step("All done.") == Step([], True)
    assert (episode.answer, episode.turns) == ("All done.", 3)
    assert episode.scores() == {"calls": 0.5, "format": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="the episode was over after 3 turns: reset the environment before the next step"):
        episode.step("More.")


def test_results_and_calls_are_bounded():
    episode = turns()
    long = episode.step(write([Call("rows", {"count": 2000})])).messages[0]["content"]
    assert long.endswith(" [cut off]") and len(long) == 10_010
    assert len(episode.step(write([Call("rows", {})] * 100)).messages) == 32


def test_the_last_turn_ends_the_episode():
    episode = turns(most=2)
    assert not episode.step(write([Call("rows", {})])).done
    assert episode.step(write([Call("rows", {})])) == Step([], True)
    assert episode.answer is None and episode.done
    with pytest.raises(ValueError, match="an episode must have 1 turn or more, got 0"):
        turns(most=0)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_problem_of_the_shop_is_solved(split):
    for difficulty, seed in PLACES:
        environment = Shop()
        problem = environment.reset(seed, difficulty, split)
        json.dumps(problem.reference)
        chat = solve(environment, problem)
        scores = environment.score()
        assert scores.pop("correct") == 1.0, (problem, chat, scores)
        assert set(scores.values()) <= {1.0, None}
        assert len(chat) <= len(problem.messages) + 2 * 10 + 1
        # What is trained on in SFT is what a template takes: roles in turn.
        assert [message["role"] for message in chat[2:]] == ["assistant", "tool"] * ((len(chat) - 3) // 2) + ["assistant"]


def test_the_shop_in_the_other_form():
    environment = Shop("lfm3")
    for difficulty, seed in PLACES[::10]:
        solve(environment, environment.reset(seed, difficulty))
        assert environment.score()["correct"] == 1.0


def test_requests_name_what_a_model_must_know():
    kinds = set()
    for difficulty, seed in PLACES:
        problem = Shop().reset(seed, difficulty)
        text = problem.messages[1]["content"]
        for goal in problem.reference["goals"]:
            kinds.add(goal["kind"])
            known = ("order_id",) if goal["order_id"] else ("name", "from", "product")
            assert all(str(goal[key]) in text for key in (*known, "quantity", "city") if goal[key] is not None)
        assert ("O10" in text) == (difficulty == 1)
        # Two customers of one name are told apart by their cities.
        names = [row["name"] for row in problem.reference["before"]["customers"].values()]
        assert (len(set(names)) < len(names)) == (difficulty > 3)
    assert kinds == {"cancel", "quantity", "refund", "undo", "move", "order", "ask"}


def test_harder_problems_ask_for_what_is_forbidden():
    """Such a goal changes nothing, and every problem still has something to do."""
    forbidden = dict.fromkeys(range(1, 6), 0)
    for difficulty, seed in PLACES:
        reference = Shop().reset(seed, difficulty).reference
        orders = [list(order.values()) for order in reference["after"]["orders"].values()]
        before = [list(order.values()) for order in reference["before"]["orders"].values()]
        writes = sum(order not in before for order in orders)
        writes += sum(row not in reference["before"]["customers"].values() for row in reference["after"]["customers"].values())
        asked = sum(goal["kind"] != "ask" for goal in reference["goals"])
        assert writes <= asked
        assert writes >= 1 or reference["goals"][0]["kind"] == "ask"
        forbidden[difficulty] += asked - writes
    assert [forbidden[difficulty] for difficulty in (1, 2, 3)] == [0, 0, 0]
    assert forbidden[4] >= 3 and forbidden[5] >= 6


def played(difficulty: int, seed: int, *calls: Call, answer: str = "Done.") -> dict:
    environment = Shop()
    environment.reset(seed, difficulty)
    for call in calls:
        environment.step(write([call]))
    environment.step(answer)
    return environment.score()


def find(kind: str, difficulty: int = 2):
    """(seed, problem, the goal's customer and order) of the first problem with that kind of goal alone."""
    for seed in range(200):
        problem = Shop().reset(seed, difficulty)
        (goal, *others) = problem.reference["goals"]
        if goal["kind"] == kind and not others:
            database = problem.reference["before"]
            (customer,) = (key for key, row in database["customers"].items() if row["name"] == goal["name"])
            orders = [key for key, row in database["orders"].items() if row["customer_id"] == customer]
            order = next((key for key in orders if database["orders"][key]["product"] == goal["product"]), None)
            return seed, problem, customer, order
    raise AssertionError(kind)


def test_wrong_writes_cost():
    seed, problem, customer, order = find("cancel")
    right = Call("cancel_order", {"order_id": order})
    assert played(2, seed, right) == {
        "correct": 1, "changes": 1, "restraint": 1, "answer": None, "calls": 1, "format": 1
    }  # fmt: skip
    nothing = played(2, seed)
    assert (nothing["correct"], nothing["changes"], nothing["restraint"], nothing["calls"]) == (0, 0, 1, None)
    # The right write and a wrong one; the wrong one alone; a write that another takes back.
    wrong = Call("update_city", {"customer_id": customer, "city": "Nowhere"})
    both = played(2, seed, right, wrong)
    assert (both["correct"], both["changes"], both["restraint"]) == (0, 1, 0.5)
    alone = played(2, seed, wrong)
    assert (alone["correct"], alone["changes"], alone["restraint"]) == (0, 0, 0)
    back = Call("update_city", {"customer_id": customer, "city": problem.reference["before"]["customers"][customer]["city"]})
    assert played(2, seed, right, wrong, back)["correct"] == 1
    # Without an answer, or with an empty one, it is not done.
    assert played(2, seed, right, answer=" ")["correct"] == 0
    assert played(2, seed, right, answer="<|tool_call_start|>")["correct"] == 0


def test_a_new_order_may_have_any_number():
    seed, problem, customer, _ = find("order")
    goal = problem.reference["goals"][0]
    wanted = Call("place_order", {"customer_id": customer, "product": goal["product"], "quantity": goal["quantity"]})
    assert played(2, seed, wanted)["correct"] == 1
    assert played(2, seed, wanted, wanted)["restraint"] == 0.5
    fewer = wanted._replace(arguments=wanted.arguments | {"quantity": goal["quantity"] + 1})
    assert played(2, seed, fewer)["correct"] == 0


@pytest.mark.parametrize(
    ("answer", "right"), [("{}", 1), ("They cost 1 {}.00 EUR.", 1), ("{}, I think, of 2", 0), ("many", 0), ("9" * 10_000, 0)]
)
def test_a_number_that_is_asked_for_comes_last(answer, right):
    environment = Shop()
    seed, problem = next((seed, problem) for seed in range(99) if (problem := environment.reset(seed, 3)).reference["number"])
    chat = solve(environment, problem)
    environment.reset(seed, 3)
    for message in chat[2:-1]:
        if message["role"] == "assistant":
            environment.step(message["content"])
    environment.step(answer.format(problem.reference["number"]))
    # All the changes are made, and it is right only with the number.
    assert environment.score() | {"calls": 1} == {
        "correct": right, "changes": 1, "restraint": 1, "answer": right, "calls": 1, "format": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (Call("cancel_order", {"order_id": "O9"}), "there is no order 'O9'"),
        (Call("list_orders", {"customer_id": "O9"}), "there is no customer 'O9'"),
        (Call("change_quantity", {"order_id": "O1001", "quantity": 0}), "quantity must be 1 or more, got 0"),
        (Call("place_order", {"customer_id": "C101", "product": "kettle", "quantity": 0}), "quantity must be 1 or more, got 0"),
        (Call("place_order", {"customer_id": "C101", "product": "tea", "quantity": 1}), "product must be one of desk lamp, "),
    ],
)
def test_tools_of_the_shop_refuse(call, error):
    environment = Shop()
    environment.reset(0, 2)
    (message,) = environment.step(write([call])).messages
    assert json.loads(message["content"])["error"].startswith(error)
    assert environment.score()["calls"] == 0 and environment.score()["restraint"] == 1


def test_what_is_not_pending_cannot_be_cancelled():
    environment = Shop()
    orders = environment.reset(0, 2).reference["before"]["orders"]
    for key, order in orders.items():
        content = json.loads(environment.step(write([Call("cancel_order", {"order_id": key})])).messages[0]["content"])
        if order["status"] == "pending":
            assert content["status"] == "cancelled"
        else:
            assert content == {"error": f"the order {key} is {order['status']}; only a pending one can be changed"}
        if environment._turns.turns == environment.max_turns - 1:
            break


def test_episodes_do_not_touch_each_other():
    one, other = Shop(), Shop()
    problem = one.reset(3, 5)
    solve(one, problem)
    assert other.reset(3, 5) == one.reset(3, 5) == problem
    assert one.score()["correct"] == 0
    assert one.reset(4, 5) != problem


def test_an_episode_must_begin():
    for act in (lambda: Shop().step("x"), Shop().score):
        with pytest.raises(ValueError, match="the environment must be reset before its first step"):
            act()


def test_held_out_goals_are_never_trained_on():
    def goals(split):
        problems = (Shop().reset(seed, difficulty, split) for difficulty, seed in PLACES)
        return {json.dumps(sorted(problem.reference["goals"], key=repr)) for problem in problems}

    assert not goals("train") & goals("held_out")
    assert len(goals("held_out")) > 130


def test_nothing_that_a_model_writes_raises():
    rng = random.Random(1)
    environment = Shop()
    problem = environment.reset(0, 5)
    sound = [message["content"] for message in solve(environment, problem) if message["role"] == "assistant"]
    for _ in range(300):
        step = Step([], True)
        for _ in range(4):
            if step.done:
                environment.reset(rng.randrange(9), 5)
            text = list(rng.choice(sound))
            for _ in range(rng.randint(0, 3)):
                at = rng.randrange(len(text))
                text[at : at + rng.randint(0, 3)] = rng.choices("'\"()[]{}=,-0Cé\0", k=rng.randint(0, 3))
            step = environment.step("".join(text))
            assert all(0 <= part <= 1 for part in environment.score().values() if part is not None)
    assert parse(sound[0]).calls
