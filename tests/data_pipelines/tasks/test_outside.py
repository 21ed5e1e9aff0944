"""What others have written: classes for TRL as they are, and reasoning-gym's data sets with their curricula and scorers."""

import inspect
import json
import math
import random
import sys

import pytest

from data_pipelines.tasks import outside
from data_pipelines.tasks.outside import ReasoningGym, TrlEnvironment
from data_pipelines.tasks.tool_calls import Call, write


class Guess:
    """A game as TRL's documentation writes them: find a number between 1 and the limit."""

    def __init__(self):
        self.resets = 0

    def reset(self, secret: int, limit: int = 9, **row) -> str | None:
        self._secret, self._limit, self._guesses = secret, limit, 0
        self._found = False
        self.resets += 1
        row["prompt"].append("a class may do with its row what it likes")
        return f" It is between 1 and {limit}."

    def guess(self, number: int) -> str:
        """Guesses the number.

        Args:
            number: The number that you guess.

        Returns:
            Whether it is right, too small or too large.
        """
        if not 1 <= number <= self._limit:
            raise ValueError(f"{number} is out of range")
        self._guesses += 1
        self._found = number == self._secret
        return "right" if self._found else "too small" if number < self._secret else "too large"

    async def hint(self) -> dict[str, bool]:
        """Says whether the number is even."""
        return {"even": self._secret % 2 == 0}

    def get_reward(self) -> float:
        return 2.0 / self._guesses if self._found else -1.0

    def _private(self) -> None: ...


ROWS = [{"prompt": [{"role": "user", "content": f"Game {row}."}], "secret": row % 9 + 1} for row in range(60)]


def guessing(**settings) -> TrlEnvironment:
    return TrlEnvironment(Guess, ROWS, name="guess", **settings)


def test_a_class_for_trl_is_played_as_it_is():
    environment = guessing()
    problem = environment.reset(0, 1)
    row = problem.reference
    assert row in ROWS  # nothing that the class did to its row is there
    (message,) = problem.messages
    assert message == {"role": "user", "content": row["prompt"][0]["content"] + " It is between 1 and 9."}
    assert [tool["function"]["name"] for tool in problem.tools] == ["guess", "hint"]
    assert problem.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"number": {"type": "integer", "description": "The number that you guess."}},
        "required": ["number"],
    }
    even, outside = environment.step(write([Call("hint", {}), Call("guess", {"number": 10})])).messages
    assert json.loads(even["content"]) == {"even": row["secret"] % 2 == 0}
    assert json.loads(outside["content"]) == {"error": "10 is out of range"}
    assert environment.score() == {"correct": 0.0, "calls": 0.5, "format": 1.0}
    number, said = 0, ""
    while said != "right":
        number += 1
        said = environment.step(write([Call("guess", {"number": number})])).messages[0]["content"]
    assert environment.score()["correct"] == pytest.approx(min(2 / number, 1))
    assert environment.step("Found it.").done


@pytest.mark.parametrize("name", ["reset", "get_reward", "_private", "no_such"])
def test_what_is_no_tool_cannot_be_called(name):
    environment = guessing()
    environment.reset(0, 1)
    (message,) = environment.step(write([Call(name, {})])).messages
    assert f"there is no tool '{name}'; there are guess, hint" in message["content"]
    assert environment._object.resets == 1


def test_rows_are_split_by_their_content_and_drawn_by_seed():
    train, held_out = (
        {json.dumps(guessing().reset(seed, 1, split).reference) for seed in range(120)} for split in ("train", "held_out")
    )
    assert not train & held_out
    assert len(held_out) >= 3 and len(train) > 30
    assert guessing().reset(7, 1) == guessing().reset(7, 1)
    with pytest.raises(ValueError, match="guess, difficulty 1, seed 0: of 200 problems none is held_out"):
        TrlEnvironment(Guess, [json.loads(min(train))], name="guess").reset(0, 1, "held_out")


class Silent:
    """Without tools, a text at the beginning and a reward."""

    def reset(self, **row):
        self.row = row


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ({"prompt": "Hello."}, [{"role": "user", "content": "Hello."}]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, None),
        ({}, [{"role": "user", "content": ""}]),
    ],
)
@pytest.mark.parametrize(("reward", "correct"), [(0.25, 0.25), (3, 1), (-1, 0), (None, None), (math.nan, None)])
def test_rewards_and_prompts_of_other_classes(prompt, messages, reward, correct):
    environment = TrlEnvironment(Silent, [prompt], name="silent", reward=lambda played: reward if played.row == prompt else 9)
    for split in ("train", "held_out"):
        try:
            problem = environment.reset(0, 1, split)
        except ValueError:  # the only row is of the other split
            continue
        assert problem.messages == (messages or prompt["prompt"]) and problem.tools is None
        assert environment.step("Words.").done
        assert environment.score() == {"correct": correct, "calls": None, "format": 1.0}
        break


def test_a_text_is_added_to_parts():
    class Parts(Guess):
        def reset(self, **row):
            return "look"

    rows = [{"prompt": [{"role": "user", "content": [{"type": "text", "text": str(row)}]}]} for row in range(9)]
    (message,) = TrlEnvironment(Parts, rows, name="parts").reset(0, 1).messages
    assert message["content"][1:] == [{"type": "text", "text": "look"}]


class NoDocstring(Silent):
    def tool(self, x: int) -> int: ...


@pytest.mark.parametrize(
    ("factory", "settings", "message"),
    [
        (dict, {"reward": float}, "a class for environment_factory must have a method reset, <class 'dict'> has none"),
        (Silent, {}, "the reward must come either from get_reward of .*Silent.* or from the argument `reward`"),
        (Guess, {"reward": float}, "the reward must come either from get_reward of .*Guess"),
        (NoDocstring, {"reward": float}, "the tool tool must have a docstring"),
        (Guess, {"max_turns": 0}, "an episode must have 1 turn or more, got 0"),
    ],
)
def test_classes_that_cannot_be_played(factory, settings, message):
    with pytest.raises(ValueError, match=message):
        TrlEnvironment(factory, ROWS, name="x", **settings)


def test_an_episode_must_begin_and_end():
    for act in (lambda: guessing().step("x"), guessing().score):
        with pytest.raises(ValueError, match="guess must be reset before its first step"):
            act()
    environment = guessing(max_turns=1)
    environment.reset(0, 1)
    assert environment.step(write([Call("hint", {})])).done
    with pytest.raises(ValueError, match="the episode was over after 1 turns"):
        environment.step("x")
    environment.reset(1, 1)
    assert environment._object.resets == 2  # one object, as in TRL


# Quick to make, and of each kind: numbers, words, boards, a stored answer that is none, no curriculum.
DATASETS = ("chain_sum", "countdown", "spell_backward", "n_queens", "propositional_logic", "string_insertion", "list_functions")


@pytest.fixture(scope="module")
def gym():
    pytest.importorskip("reasoning_gym")
    return {name: ReasoningGym(name) for name in DATASETS}


def test_without_reasoning_gym(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"reasoning-gym is not installed; run: pip install -c constraints.txt -e '.\[eval\]'"):
        ReasoningGym("chain_sum")


@pytest.mark.parametrize("name", DATASETS)
def test_stored_answers_score_as_the_data_set_says(gym, name):
    task = gym[name]
    assert task.name == f"reasoning_gym:{name}"
    for seed in range(3):
        for difficulty in sorted({1, min(2, task.max_difficulty), min(4, task.max_difficulty)}):
            problem = task.sample(seed, difficulty)
            reference = json.loads(json.dumps(problem.reference))
            stored = reference["answer"]
            if problem.solution is None:  # propositional_logic has no stored answer
                assert name == "propositional_logic" and stored is None
            else:
                response = f"So it is <answer>1</answer>. No: {problem.solution}"
                assert task.score(response, reference) == {"correct": 1, "format": 1}
                assert task.score(stored, reference) == {"correct": 0, "format": 0}
            wrong = task.score("<answer>no idea</answer>", reference)
            assert wrong["correct"] < 0.5 and wrong["format"] == 1


class Unreliable:
    """A data set that cannot make the problems below an index."""

    def __init__(self, least: int):
        self.least = least

    def __getitem__(self, index: int) -> dict:
        if index < self.least:
            raise RuntimeError(f"gave up on {index}")
        return {"question": f"What is {index}?", "answer": str(index)}

    def score_answer(self, answer, entry):
        return {"nan": None, "huge": 7}.get(answer, float(answer == entry["answer"]))


def test_a_generator_that_gives_up(gym, monkeypatch):
    task = ReasoningGym("chain_sum")
    monkeypatch.setattr(task, "_data", lambda difficulty, block: Unreliable(2048))
    problems = [task.sample(seed, 1) for seed in range(50)]
    assert min(problem.reference["index"] for problem in problems) >= 2048
    assert all(task.score(problem.solution, problem.reference)["correct"] == 1 for problem in problems)
    # Whatever the scorer says is a number within [0, 1].
    scores = [task.score(f"<answer>{answer}</answer>", problems[0].reference)["correct"] for answer in ("nan", "huge", "x")]
    assert scores == [0, 1, 0]
    monkeypatch.setattr(task, "_data", lambda difficulty, block: Unreliable(9999))
    with pytest.raises(ValueError, match="chain_sum, difficulty 1: none of 20 problems could be made: gave up on [0-9]+; take"):
        task.sample(0, 1)


def test_curricula_are_the_difficulty(gym):
    factory = pytest.importorskip("reasoning_gym.factory")
    assert gym["chain_sum"].max_difficulty == 11 and gym["list_functions"].max_difficulty == 1
    lengths = {
        difficulty: sum(len(gym["chain_sum"].sample(seed, difficulty).messages[1]["content"]) for seed in range(20))
        for difficulty in (1, 4, 11)
    }
    assert lengths[1] < lengths[4] < lengths[11]
    # The same as reasoning-gym makes of the curriculum's level, asked without the adapter.
    problem = gym["chain_sum"].sample(3000, 4)
    curriculum = factory.create_curriculum("chain_sum")
    curriculum.set_global_level(3)
    settings = vars(curriculum.generate_configuration({"seed": 2 * 4096, "size": 4096}))
    entry = factory.create_dataset("chain_sum", **settings)[problem.reference["index"]]
    assert (entry["question"], entry["answer"]) == (problem.messages[1]["content"], problem.reference["answer"])


def test_problems_are_the_same_whatever_the_global_random_state(gym):
    for name in DATASETS:
        random.seed(1)
        problem = gym[name].sample(3, 1)
        random.seed(2)
        gym[name].sample(4, min(2, gym[name].max_difficulty))
        assert ReasoningGym(name).sample(3, 1) == problem != gym[name].sample(3 + 1024, 1)


def test_gym_splits_are_disjoint(gym):
    def questions(split):
        return {gym["spell_backward"].sample(seed, 1, split).messages[1]["content"] for seed in range(150)}

    assert not questions("train") & questions("held_out")


@pytest.mark.parametrize(
    ("text", "format_"),
    [
        ("", 0), ("<answer>", 0), ("</answer>", 0), ("</answer><answer>", 0), ("<answer></answer>", 1), ("<answer> </answer>", 1),
        ("<answer>" * 100_000, 0), ("<answer>" * 100_000 + "</answer>" * 9, 1), ("<answer>" + "1" * 1_000_000 + "</answer>", 1),
        ("<answer>1e999999999</answer>", 1), ("<answer>\ud800</answer>", 1), ("<answer>" + "(" * 99_000 + "</answer>", 1),
        ("<answer>" + "9**" * 3000 + "9</answer>", 1), ("<answer>" + "-" * 99_000 + "1</answer>", 1),
        ("<answer>" + "a." * 49_000 + "a</answer>", 1), ("<answer>f" + "()" * 49_000 + "</answer>", 1),
        ("<answer>" + "lambda:" * 14_000 + "1</answer>", 1), ("<answer>" + "1+" * 49_000 + "1</answer>", 1),
        ("<answer>" + "1+" * 4900 + "1</answer>", 1), ("<answer>" + "1 if 1 else " * 8000 + "1</answer>", 1),
    ],
    ids=range(20),
)  # fmt: skip
def test_no_answer_raises_or_hangs(gym, text, format_):
    for name in DATASETS:
        scores = gym[name].score(text, gym[name].sample(0, 1).reference)
        assert scores["format"] == format_ and scores["correct"] < 0.5


@pytest.mark.parametrize("name", [*outside._EVALUATES_VALUES, *outside._EVALUATES_FORMULAS])
def test_what_a_model_writes_is_not_run(gym, name, tmp_path):
    """These scorers call eval: an answer that would leave a file behind leaves none, and the stored one still scores 1."""
    task = ReasoningGym(name)
    for difficulty in range(1, min(task.max_difficulty, 4) + 1):
        problem = task.sample(1, difficulty)
        assert task.score(problem.solution, problem.reference)["correct"] == 1
    left = tmp_path / "left"
    for answer in (
        f"open({str(left)!r}, 'w')",
        f"[open({str(left)!r}, 'w').write('x')]",
        f"__import__('pathlib').Path({str(left)!r}).touch()",
        f"[1 for x in [open({str(left)!r}, 'w')]]",
        f"(lambda: open({str(left)!r}, 'w'))()",
        f"24 + 0*open({str(left)!r}, 'w').write('x')",
        "oracle_answer", "valid_solutions[0]", "entry['answer']", "[*oracle_answer]",
        "9**9**9**9", "(9**99)**99**9", "99999999!!", "[0] * 10**12", "'x' * 10**12", "factorial(10**9)", "10**10000000",
    ):  # fmt: skip
        assert task.score(f"<answer>{answer}</answer>", problem.reference)["correct"] == 0, answer
        assert not left.exists()


def test_unsafe_scorers_are_what_they_were(gym):
    """Which scorers hand an answer to eval, in the version that is pinned: a new one must be looked at."""
    factory = pytest.importorskip("reasoning_gym.factory")
    found = set()
    for name, (dataset, _) in factory.DATASETS.items():
        source = inspect.getsource(dataset.score_answer)
        if any(f"{call}(answer" in source for call in ("eval", "parse_expr", "exec", "sympify", "literal_eval")):
            found.add(name)
    assert found == {*outside._EVALUATES_VALUES, *outside._EVALUATES_FORMULAS, *outside._REFUSED}


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("1 + 2*(3 - 4)/5", True), ("-131 - 209 + 28*(252/28 + 242)", True), ("60*x**2 - 41*x*y + 7", True), ("x**100", True),
        ("x**101", False), ("x**-1", False), ("x**y", False), ("(x + 1)**2", False), ("2**3", False), ("xy", False),
        ("f(1)", False), ("1e101", False), ("'a'", False), ("[1]", False), ("x.y", False), ("1 if x else 2", False),
        ("", False), ("5!", False),
        ("1 +" * 4000 + "1", False), ("209836125783985834224000*x**24", True), ("True", False),
    ],
)  # fmt: skip
def test_formulas(text, formula):
    assert outside._is_formula(text) == formula


def test_data_sets_that_are_not_offered(gym):
    with pytest.raises(ValueError, match="dataset must be one of reasoning-gym's, got 'chain_sums'; they are .*chain_sum, "):
        ReasoningGym("chain_sums")
    with pytest.raises(ValueError, match="simple_integration is not offered: its scorer runs what a model writes"):
        ReasoningGym("simple_integration")
    # The first level of its curriculum is outside of what its configuration allows, in 0.1.25.
    with pytest.raises(ValueError, match="knight_swap cannot be made at difficulty 1: min_nodes must be >= 6; take another"):
        ReasoningGym("knight_swap").sample(0, 1)
