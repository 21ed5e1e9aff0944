"""How a model answers held-out problems: doom loops, accuracy, length and repetition at several temperatures, with intervals."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from data_pipelines.conversations import Conversation
from data_pipelines.tasks import Gsm8k, Split, Task, in_turn, tasks_named
from experiments.answering import Answerer
from experiments.preference_data import answer_seed
from experiments.results import write_results
from experiments.stages import load_stage
from lfm_jax.configuration import ConfigError, mistakes_in
from lfm_jax.generation import EngineConfig, SamplingConfig
from lfm_jax.generation.loops import inner_loop
from lfm_jax.models import ComputeConfig
from lfm_jax.sharding import MeshConfig, make_mesh

# Those of which the figures have an interval: NAME_share, NAME_low and NAME_high.
SHARES = ("tail_loop", "inner_loop", "limit", "right")
_95_PERCENT = statistics.NormalDist().inv_cdf(0.975)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: the model, a workdir or a Hugging Face folder.

    tasks: by name, or gsm8k:PATH. problems: of each task, of the difficulties in turn (none: all of the task's) and of each the
    seeds from `seed` on; fewer of a file that has fewer, as each of its own is asked once. split: of them. temperatures: at each
    of which every problem is answered once; 0: the most likely tokens. max_new_tokens: of an answer. chat_format: as in
    `ConversationSources`. mesh: over the devices of one host.
    """

    init_from: str
    tasks: tuple[str, ...]
    problems: int = 256
    difficulties: tuple[int, ...] = ()
    split: Split = "held_out"
    temperatures: tuple[float, ...] = (0.0, 0.1, 0.6)
    max_new_tokens: int = 512
    chat_format: str = "auto"
    engine: EngineConfig = EngineConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    def __post_init__(self):
        if not self.tasks or not self.temperatures or self.problems < 1:
            raise ValueError(
                "give at least one task, one problem and one temperature, got "
                f"{self.tasks}, {self.problems} and {self.temperatures}"
            )
        for temperature in self.temperatures:
            SamplingConfig(temperature=temperature, max_new_tokens=self.max_new_tokens)  # refuses


class Question(NamedTuple):
    """A problem of a task. number: among all that are asked."""

    number: int
    task: Task
    conversation: Conversation
    reference: Any


def main(config: Config, workdir: epath.Path) -> None:
    """Answers, and writes answers.jsonl, all answers with what became of each; answers.md, the table; and results.json."""
    with mistakes_in("mesh"):
        mesh = make_mesh(config.mesh, jax.local_devices())
    stage = load_stage(config.init_from, config.compute, mesh)
    with mistakes_in("tasks or difficulties"):
        asked = questions(config.tasks, config.problems, config.difficulties, config.split, config.seed)
    answerer = Answerer(stage, config.chat_format, config.engine, mesh)
    answers = answer(answerer, asked, config.temperatures, config.max_new_tokens, config.seed)
    if jax.process_index() == 0:
        (workdir / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    rows = measure(answers)
    (workdir / "answers.md").write_text(markdown(rows))
    counts = {"problems": len(asked), "answers": len(answers)}
    write_results(workdir, {"checkpoint_step": stage.step, **counts, "rows": rows}, config)
    print(markdown(rows))


def questions(names: Sequence[str], problems: int, difficulties: Sequence[int], split: Split, seed: int) -> list[Question]:
    """So many problems of each task. Those of a file are as many as there are, and none is asked twice; those that are drawn are
    drawn each by itself.

    Raises:
      ValueError: a task of no such name or difficulty, or two of one name.
    """
    found: list[Question] = []
    for name, task in zip(names, tasks_named(names), strict=True):
        of_file: set[str] = set()
        for at, difficulty in in_turn(task, problems, difficulties, seed):
            problem = task.sample(at, difficulty, split)
            if isinstance(task, Gsm8k):
                question = problem.messages[-1]["content"]
                if question in of_file:
                    continue
                of_file.add(question)
            conversation = Conversation(problem.messages, problem.tools or (), f"{name}, difficulty {difficulty}, seed {at}")
            found.append(Question(len(found), task, conversation, problem.reference))
    return found


def answer(
    answerer: Answerer, asked: Sequence[Question], temperatures: Sequence[float], max_new_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """One answer to each question at each temperature, as `Answerer.told` has it, with the question's number and task, the
    temperature, whether it is right (None: that does not apply), and `inner_loop`, whether it loops anywhere.

    An answer's draws follow from the seed, the question's number and the temperature alone.

    Raises:
      ConfigError: the chat format cannot write a question, or the context has no room for an answer.
    """
    pairs = [(question, temperature) for question in asked for temperature in temperatures]
    prompts = dict(zip((question.number for question in asked), _prompts(answerer, asked, max_new_tokens), strict=True))
    requests = [
        answerer.request(
            prompts[question.number],
            SamplingConfig(
                temperature=temperature, top_p=1.0, max_new_tokens=max_new_tokens,
                seed=answer_seed(seed, question.number, round(1000 * temperature)),
            ),
        )
        for question, temperature in pairs
    ]  # fmt: skip
    answers = []
    for (question, temperature), completion in zip(pairs, answerer.engine.run(requests), strict=True):
        told = answerer.told(completion)
        correct = question.task.score(told["text"], question.reference)["correct"]
        about = {"number": question.number, "task": question.task.name, "temperature": temperature}
        loops = told["ending"] == "inner_loop" or inner_loop(completion.tokens) is not None
        answers.append({**about, "right": None if correct is None else correct == 1, "inner_loop": loops, **told})
    return answers


def _prompts(answerer: Answerer, asked: Sequence[Question], max_new_tokens: int) -> list[tuple[int, ...]]:
    found = answerer.prompts([question.conversation for question in asked], max_new_tokens)
    refused = next((reason for reason in found if isinstance(reason, str)), None)
    if refused is not None:
        raise ConfigError(f"--config.tasks or max_new_tokens: {refused}")
    return found


def measure(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of the answers of `answer`, by task and temperature.

    tail_loop: the share that ends in a doom loop, inner_loop: that loops anywhere, limit: that reached its limit without a loop
    (`lfm_jax.generation.loops`), right: of those that can be right or wrong; with their 95 % intervals. mean_tokens, and
    mean_tokens_right: of all and of the right answers; a model may end its loops by saying nothing. repetition: the mean share of
    10-grams that stood in the answer before.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for each in answers:
        groups.setdefault((each["task"], each["temperature"]), []).append(each)
    return [
        {"task": task, "temperature": temperature, **_figures(groups[task, temperature])}
        for task, temperature in groups
    ]  # fmt: skip


def _figures(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    verified = [each["right"] for each in answers if each["right"] is not None]
    counts = {
        "tail_loop": (sum(each["ending"] == "tail_loop" for each in answers), len(answers)),
        "inner_loop": (sum(each["inner_loop"] for each in answers), len(answers)),
        "limit": (sum(each["ending"] == "limit" for each in answers), len(answers)),
        "right": (sum(verified), len(verified)),
    }
    figures: dict[str, Any] = {"answers": len(answers)}
    for name in SHARES:
        figures |= share_figures(name, *counts[name])
    lengths = [each["tokens"] for each in answers]
    of_right = [each["tokens"] for each in answers if each["right"]]
    return figures | {
        "mean_tokens": statistics.mean(lengths),
        "mean_tokens_right": statistics.mean(of_right) if of_right else None,
        "repetition": statistics.mean(each["repetition"] for each in answers),
    }


def share_figures(name: str, count: int, of: int) -> dict[str, float | None]:
    """NAME_count, NAME_share, NAME_low and NAME_high; the last three are None where there is nothing to have a share of."""
    low, high = wilson(count, of) if of else (None, None)
    share = count / of if of else None
    return {f"{name}_count": count, f"{name}_share": share, f"{name}_low": low, f"{name}_high": high}


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): it holds for shares near 0 and 1 and for few trials, too.

    Raises:
      ValueError: there are no trials, or more successes than trials.
    """
    if not 0 <= count <= of or of < 1:
        raise ValueError(f"an interval needs trials, and at most as many successes, got {count} of {of}")
    z, share = _95_PERCENT, count / of
    middle = share + z * z / (2 * of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    low, high = (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)
    return (0.0 if count == 0 else low), (1.0 if count == of else high)  # which rounding would miss by a little


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table: shares in percent with their intervals."""
    lines = [
        "| task | temperature | doom loops | loops anywhere | limit, no loop | right | tokens | of right answers | repetition |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["task"], f"{row['temperature']:g}", *(share_cell(row, name) for name in SHARES)]
        lengths = ["–" if row[name] is None else f"{row[name]:.0f}" for name in ("mean_tokens", "mean_tokens_right")]
        lines.append(f"| {' | '.join([*cells, *lengths, format(row['repetition'], '.2f')])} |")
    return "\n".join(lines) + "\n"


def share_cell(row: dict[str, Any], name: str) -> str:
    """In percent, with its interval."""
    if row[f"{name}_share"] is None:
        return "–"
    share, low, high = (100 * row[f"{name}_{part}"] for part in ("share", "low", "high"))
    return f"{share:.1f} % ({low:.1f} to {high:.1f})"
