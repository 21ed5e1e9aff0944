"""Generated tool-use problems: sound schemas, solutions that score 1, near misses that do not, two disjoint splits."""

import collections
import json

import jsonschema
import pytest

from data_pipelines.tasks import tool_use
from data_pipelines.tasks.tool_calls import Call, parse, write
from data_pipelines.tasks.tool_use import ToolUse

FORMS = ("lfm2", "lfm3")
TASKS = {form: ToolUse(form) for form in FORMS}
# (difficulty, seed): enough that every function and every kind of value is there.
PLACES = [(difficulty, seed) for difficulty in range(1, 6) for seed in range(60)]


def problems(form: str = "lfm2", split: str = "train"):
    return [TASKS[form].sample(seed, difficulty, split) for difficulty, seed in PLACES]


@pytest.mark.parametrize("form", FORMS)
def test_solutions_score_one_in_every_part(form):
    task = TASKS[form]
    for problem in problems(form):
        scores = task.score(problem.solution, json.loads(json.dumps(problem.reference)))
        expected = {1.0} if problem.reference["calls"] else {1.0, None}
        assert set(scores.values()) == expected, (problem, scores)
        assert task.score("", problem.reference)["correct"] == 0


def test_calls_fit_the_schemas_that_are_offered():
    """Judged by jsonschema, not by our own rules."""
    checked = set()
    for problem in problems():
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in problem.tools}
        assert len(schemas) == len(problem.tools)
        for call in parse(problem.solution).calls:
            judge = jsonschema.Draft202012Validator(schemas[call.name] | {"additionalProperties": False})
            assert judge.is_valid(call.arguments)
        checked |= {json.dumps(schema) for schema in schemas.values()}
    assert len(checked) == 14
    for schema in map(json.loads, checked):
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_request_names_every_value():
    for problem in problems():
        text = problem.messages[-1]["content"]
        for call in parse(problem.solution).calls:
            for value in call.arguments.values():
                parts = value if isinstance(value, list) else [value]
                parts = [part for each in parts for part in (each.values() if isinstance(each, dict) else [each])]
                assert all(part is True or str(part) in text for part in parts), (value, text)


def test_difficulty_adds_functions_calls_and_requests_that_nothing_answers():
    tools, calls, optional = collections.Counter(), collections.Counter(), collections.Counter()
    none, named = collections.Counter(), collections.Counter()
    for (difficulty, _), problem in zip(PLACES, problems(), strict=True):
        functions = {tool["function"]["name"]: tool["function"]["parameters"] for tool in problem.tools}
        for call in parse(problem.solution).calls:
            optional[difficulty] += len(functions[call.name]["properties"]) - len(functions[call.name]["required"])
            named[difficulty] += len(call.arguments) - len(functions[call.name]["required"])
        wanted = problem.reference["calls"]
        tools[difficulty] += len(problem.tools)
        calls[difficulty] += len(wanted)
        none[difficulty] += not wanted
    assert tools[1] == 60 < tools[2] < tools[3] < tools[5]
    assert calls[1] == 60 and calls[3] < calls[4] < calls[5]
    assert none[1] == 0 and all(1 <= none[difficulty] <= 24 for difficulty in range(2, 6))
    # Optional arguments that the request names: none at first, then most.
    assert named[1] == 0 and named[2] < 0.7 * optional[2] and named[5] > 0.7 * optional[5]


def test_several_calls_are_of_one_function_or_of_several():
    kinds = collections.Counter()
    for problem in problems():
        names = [name for call in problem.reference["calls"] for name in call]
        if len(names) > 1:
            kinds[len(set(names)) == 1] += 1
    assert min(kinds[True], kinds[False]) > 20


def test_functions_that_do_not_fit_are_related_ones():
    """Where none is needed, the harder problems offer functions of the same domain: refusing takes more than a glance."""
    for problem in problems():
        if not problem.reference["calls"]:
            assert problem.tools
            assert TASKS["lfm2"].score(problem.solution, problem.reference)["correct"] == 1
            some = problem.tools[0]["function"]
            call = write([Call(some["name"], {})])
            assert TASKS["lfm2"].score(call, problem.reference) == {"correct": 0, "format": 0, "name": None, "arguments": None}


def test_near_misses_score_between():
    task = TASKS["lfm2"]
    changed = collections.Counter()
    for problem in problems():
        calls = parse(problem.solution).calls
        if not calls:
            continue
        first, rest = calls[0], calls[1:]
        (accepted,) = problem.reference["calls"][0].values()

        def score(call, problem=problem, rest=rest):
            return task.score(write([call, *rest]), problem.reference)

        key, value = next(iter(first.arguments.items()))
        wrong = score(first._replace(arguments={**first.arguments, key: [value]}))
        assert wrong["correct"] == 0 and wrong["name"] == 1 and 0 <= wrong["arguments"] < 1
        assert score(Call("no_such_function", first.arguments))["name"] == pytest.approx(1 - 1 / len(calls))
        assert score(first._replace(arguments={**first.arguments, "unknown": 1}))["correct"] == 0
        for key, values in accepted.items():
            without = {other: value for other, value in first.arguments.items() if other != key}
            assert score(first._replace(arguments=without))["correct"] == ("" in values)
            if key not in first.arguments and values[0] is not None:  # the default itself
                changed["default"] += 1
                assert score(first._replace(arguments={**first.arguments, key: values[0]}))["correct"] == 1
        assert task.score(write(calls[::-1]), problem.reference)["correct"] == 1
        doubled = task.score(write([*calls, first]), problem.reference)
        assert doubled["correct"] == 0 and doubled["arguments"] == pytest.approx(len(calls) / (len(calls) + 1))
        assert task.score(problem.solution.replace(")]", "]"), problem.reference)["format"] == 0
    assert changed["default"] > 50


def test_the_same_arguments_give_the_same_problem():
    for form in FORMS:
        assert problems(form)[::7] == [ToolUse(form).sample(seed, difficulty) for difficulty, seed in PLACES[::7]]
    assert TASKS["lfm2"].sample(0, 3) != TASKS["lfm2"].sample(1, 3)


def asked(problem) -> set[str]:
    """The calls that a request stands for, whatever its wording and whatever is offered."""
    return {json.dumps(sorted(parse(problem.solution).calls, key=repr))} if problem.reference["calls"] else set()


def test_what_is_held_out_is_never_trained_on():
    train = set().union(*map(asked, problems()), *(asked(TASKS["lfm2"].sample(seed, 1)) for seed in range(800)))
    held_out = set().union(*map(asked, problems(split="held_out")))
    assert len(held_out) > 200 and len(train) > 900
    assert not train & held_out


def test_few_functions_of_few_values(monkeypatch):
    """Where the same calls come up again and again: never twice in one problem, and in one split only, in whatever order."""
    argument = tool_use._Argument({"type": "integer", "description": "A number."}, tool_use._integer(1, 5))
    functions = tuple(tool_use._Function("x", name, "Does it.", f"{name} {{v}}.", {"v": argument}) for name in "fgh")
    monkeypatch.setattr(tool_use, "_FUNCTIONS", functions)
    splits = {split: [ToolUse().sample(seed, 5, split) for seed in range(200)] for split in ("train", "held_out")}
    for problem in (*splits["train"], *splits["held_out"]):
        assert len({json.dumps(call) for call in problem.reference["calls"]}) == len(problem.reference["calls"])
    train, held_out = (set().union(*map(asked, splits[split])) for split in splits)
    assert train and held_out and not train & held_out


@pytest.mark.parametrize("difficulty", [0, 6])
def test_a_difficulty_that_it_does_not_have(difficulty):
    with pytest.raises(ValueError, match=f"tool_use has difficulties 1 to 5, got {difficulty}"):
        TASKS["lfm2"].sample(0, difficulty)
