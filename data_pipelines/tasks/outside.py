"""What others have written, as tasks and environments: classes for TRL's `environment_factory`, data sets of reasoning-gym."""

import ast
import copy
import functools
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.tasks.multi_turn import Step, Turns, tool_methods
from data_pipelines.tasks.task import Problem, Scores, Split, draw
from data_pipelines.tasks.tool_calls import Form, depth

_RESERVED = ("reset", "get_reward")

_ANSWER = ("<answer>", "</answer>")
# A data set is made for so many seeds in a row, and so many problems are drawn from for them.
_SEEDS, _PROBLEMS = 1024, 4096
_MOST_TRIES = 20
_GYM_SYSTEM = f"Think first. Then give the answer, and nothing else, between {_ANSWER[0]} and {_ANSWER[1]}."
# The longest stored answers, large matrices, have a fifth of it.
_MOST_ANSWER_CHARACTERS = 100_000
# Fraction and Decimal write such a number out.
_HUGE_EXPONENT = re.compile(r"\d[eE][+-]?\d{4}")
# What a scorer of reasoning-gym 0.1.25 hands to eval (the latter in SymPy's parse_expr). These answers are looked at first.
_EVALUATES_VALUES = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
_EVALUATES_FORMULAS = ("countdown", "polynomial_multiplication", "puzzle24")
# They evaluate, differentiate and simplify any expression of SymPy: no look at it tells how long that takes.
_REFUSED = ("intermediate_integration", "simple_integration")
_MOST_FORMULA_CHARACTERS = 10_000
_MOST_NUMBER = 1e100
_MOST_EXPONENT = 100
_MOST_DEPTH = 16
_VALUES = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd)
_FORMULAS = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd, ast.BinOp, ast.Add, ast.Sub, ast.Mult,
    ast.Div, ast.Pow,
)  # fmt: skip


class TrlEnvironment:
    """A class for TRL's `environment_factory`, as it is, as an `Environment`.

    Source: trl 1.16, GRPOTrainer. Such a class has `reset(**row) -> str | None`, whose text is appended to the prompt, public
    methods with type hints and docstrings, which are the tools, and maybe `get_reward() -> float`. One object of it is made and
    reset for each episode, as TRL does it. The rows are those of the data set: plain values of JSON, with the messages (or the
    user's text) under "prompt"; their content decides which are held out. There is one difficulty.

    Scores: correct (the reward within [0, 1]; None if it is None or no number) and those of `Turns.scores`.
    """

    max_difficulty = 1

    def __init__(
        self,
        factory: Callable[[], Any],
        rows: Sequence[dict[str, Any]],
        *,
        name: str,
        reward: Callable[[Any], float | None] | None = None,
        form: Form = "lfm2",
        max_turns: int = 16,
    ):
        """Makes the object.

        Args:
          factory: the class, or what makes an object of it.
          rows: the data set's rows.
          name: of this environment, for configs and metrics.
          reward: the reward of the object after an episode, where it has no `get_reward`: in TRL a reward function would read it.
          form: how calls are written, see `tool_calls.parse`.
          max_turns: turns of an episode at most.

        Raises:
          ValueError: the object has no `reset`, or there is no reward or two; a tool that says too little (see `tool_schema`).
        """
        self.name = name
        self.form = form
        self.max_turns = max_turns
        self._object = factory()
        self._rows = list(rows)
        if not callable(getattr(self._object, "reset", None)):
            raise ValueError(f"{name}: a class for environment_factory must have a method reset, {type(self._object)!r} has none")
        if hasattr(self._object, "get_reward") == (reward is not None):
            raise ValueError(
                f"{name}: the reward must come either from get_reward of {type(self._object)!r} or from the argument `reward`"
            )
        self._reward = reward or (lambda environment: environment.get_reward())
        self._turns: Turns | None = None
        self._new_turns()

    def reset(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Environment.reset`. The reference is the row."""
        row = draw(self, seed, difficulty, split, self._drawn).reference
        text = self._object.reset(**copy.deepcopy(row))
        self._turns = self._new_turns()
        return Problem(messages=_with_text(row.get("prompt", []), text), tools=self._turns.schemas or None, reference=row)

    def step(self, response: str) -> Step:
        """See `Environment.step`.

        Raises:
          ValueError: it was not reset, or the episode is over.
        """
        return self._episode().step(response)

    def score(self) -> Scores:
        """See `Environment.score` and the class.

        Raises:
          ValueError: it was not reset.
        """
        parts = self._episode().scores()
        reward = self._reward(self._object)
        known = reward is not None and not math.isnan(reward)
        return {"correct": min(max(float(reward), 0.0), 1.0) if known else None, **parts}

    def _drawn(self, rng: random.Random) -> tuple[Problem, Any]:
        row = rng.choice(self._rows)
        return Problem(messages=[], reference=row), row

    def _new_turns(self) -> Turns:
        return Turns(tool_methods(self._object, _RESERVED), most=self.max_turns, form=self.form)

    def _episode(self) -> Turns:
        if self._turns is None:
            raise ValueError(f"{self.name} must be reset before its first step")
        return self._turns


def _with_text(prompt: str | list[dict[str, Any]], text: str | None) -> list[dict[str, Any]]:
    """The prompt's messages, the text at the end of the last one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else copy.deepcopy(prompt)
    messages = messages or [{"role": "user", "content": ""}]
    content = messages[-1]["content"]
    if text is not None:
        messages[-1]["content"] = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return messages


class ReasoningGym:
    """A data set of reasoning-gym (the extra `eval`) as a `Task`: its curriculum is the difficulty, its scorer the judge.

    Scores: correct (what the scorer says, in [0, 1]: some give 0.01 for any answer, and parts for answers that are nearly right;
    0 without an answer), format (whether there is an answer between its tags). A problem has a solution where the scorer gives
    its stored answer 1: some data sets have none that is stored.

    What goes to a scorer is short and, where the scorer would run it, a plain value or formula. Beyond that its time is its own.
    """

    def __init__(self, dataset: str):
        """dataset: its name there, "chain_sum" say.

        Raises:
          ImportError: reasoning-gym is not installed.
          ValueError: there is none of that name, or its scorer cannot be given what a model writes.
        """
        try:
            from reasoning_gym import factory
        except ImportError as error:
            raise ImportError("reasoning-gym is not installed; run: pip install -c constraints.txt -e '.[eval]'") from error
        if dataset not in factory.DATASETS:
            names = ", ".join(sorted(factory.DATASETS))
            raise ValueError(f"dataset must be one of reasoning-gym's, got {dataset!r}; they are {names}")
        if dataset in _REFUSED:
            raise ValueError(f"{dataset} is not offered: its scorer runs what a model writes, without a bound")
        self._dataset = dataset
        self._curriculum = factory.create_curriculum(dataset) if factory.has_curriculum(dataset) else None
        self.name = f"reasoning_gym:{dataset}"
        attributes = self._curriculum.attributes.values() if self._curriculum else ()
        self.max_difficulty = max((len(attribute.levels) for attribute in attributes), default=1)
        # Some data sets read a list of words first, others make all their problems at once.
        self._data = functools.lru_cache(maxsize=16)(self._made)

    def sample(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Task.sample`. The reference says where the problem is in which data set, since what the scorer is given with it
        may be no JSON, and has the stored answer. What is asked is the question's text.

        Raises:
          ValueError: the curriculum's own settings for this difficulty are wrong, or nothing can be made from them, besides what
            `draw` raises.
        """
        return draw(self, seed, difficulty, split, functools.partial(self._drawn, block=seed // _SEEDS, difficulty=difficulty))

    def score(self, response: str, reference: dict[str, Any]) -> Scores:
        """See `Task.score` and the class."""
        end = response.rfind(_ANSWER[1])
        start = response.rfind(_ANSWER[0], 0, max(end, 0))
        if start < 0:
            return {"correct": 0.0, "format": 0.0}
        return {"correct": self._scored(response[start + len(_ANSWER[0]) : end].strip(), reference), "format": 1.0}

    def _drawn(self, rng: random.Random, block: int, difficulty: int) -> tuple[Problem, Any]:
        data = self._data(difficulty, block)
        for attempt in range(_MOST_TRIES):
            place = {"difficulty": difficulty, "block": block, "index": rng.randrange(_PROBLEMS)}
            try:
                entry = data[place["index"]]
                break
            except Exception as error:  # some generators give up now and then
                if attempt == _MOST_TRIES - 1:
                    raise ValueError(
                        f"{self.name}, difficulty {difficulty}: none of {_MOST_TRIES} problems could be made: {error}; "
                        "take another difficulty"
                    ) from error
        stored = entry["answer"]
        sound = isinstance(stored, str) and self._scored(stored.strip(), place) == 1
        problem = Problem(
            messages=[{"role": "system", "content": _GYM_SYSTEM}, {"role": "user", "content": entry["question"]}],
            reference={**place, "answer": stored},
            solution=f"{_ANSWER[0]}{stored}{_ANSWER[1]}" if sound else None,
        )
        return problem, entry["question"]

    def _made(self, difficulty: int, block: int) -> Any:
        """A data set: its problem of an index is made from the seed and the index alone."""
        from reasoning_gym import factory

        settings = {"seed": block * _PROBLEMS, "size": _PROBLEMS}
        try:
            if self._curriculum is not None:
                self._curriculum.set_global_level(difficulty - 1)
                settings = vars(self._curriculum.generate_configuration(settings))
            return factory.create_dataset(self._dataset, **settings)
        except AssertionError as error:
            raise ValueError(f"{self.name} cannot be made at difficulty {difficulty}: {error}; take another one") from error

    def _scored(self, answer: str, place: dict[str, Any]) -> float:
        if not answer or len(answer) > _MOST_ANSWER_CHARACTERS or _HUGE_EXPONENT.search(answer):
            return 0.0
        if self._dataset in _EVALUATES_VALUES and not _is_value(answer):
            return 0.0
        if self._dataset in _EVALUATES_FORMULAS and not _is_formula(answer):
            return 0.0
        data = self._data(place["difficulty"], place["block"])
        try:
            return min(max(float(data.score_answer(answer, data[place["index"]])), 0.0), 1.0)
        except Exception:  # a scorer that trips over an answer has not found it right
            return 0.0


def _nodes(text: str) -> list[ast.AST] | None:
    """All that Python's parser finds in an expression; None for a text that is none. What is too deep for it is one odd node."""
    if re.search(r"[-+~]\s*[-+~]", text) or depth(text) > _MOST_DEPTH:
        return [ast.AST()]
    try:
        return list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError):
        return None
    except (RecursionError, MemoryError):
        return [ast.AST()]


def _is_value(text: str) -> bool:
    """Whether eval of the text is an error of syntax, or a value: it calls and computes nothing, and reads no variable of the
    scorer (one data set rewards the answer `oracle_answer`). Words in capitals are answers."""
    nodes = _nodes(text)
    return nodes is None or all(
        isinstance(node, _VALUES) and not (isinstance(node, ast.Name) and not node.id.isupper()) for node in nodes
    )


def _is_formula(text: str) -> bool:
    """Whether the text is sums, products and small powers of numbers and variables, and nothing else."""
    nodes = _nodes(text) if len(text) <= _MOST_FORMULA_CHARACTERS else None
    if nodes is None or not all(isinstance(node, _FORMULAS) for node in nodes):
        return False
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    powers = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)]
    return (
        all(type(value) in (int, float) and abs(value) < _MOST_NUMBER for value in constants)
        and all(len(node.id) == 1 for node in nodes if isinstance(node, ast.Name))
        and all(isinstance(node.left, ast.Name) and isinstance(node.right, ast.Constant) for node in powers)
        and all(node.right.value in range(_MOST_EXPONENT + 1) for node in powers)
    )
