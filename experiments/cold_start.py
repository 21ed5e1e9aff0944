"""From a cold environment back to one that can be practised: examples of just its problems, fine-tuning on them, and RL again.

Where there is no run yet that has gone cold, the experiment begins with one: a model is pre-trained, on anything else, and asked.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
from etils import epath
from jax.experimental import multihost_utils

from data_pipelines import LoaderConfig
from data_pipelines.conversations import ConversationsConfig, read_conversations
from data_pipelines.conversations.reading import split_fraction
from data_pipelines.tasks import Shop
from data_pipelines.tasks.shop import solve
from experiments import pretrain, rl, sft
from experiments.chains import run_stage
from experiments.conversations import ConversationSources
from experiments.results import FILE, write_results
from experiments.rl.batches import COLD
from experiments.rl.environments import Source, source_named
from experiments.rl.records import FOLDER
from lfm_jax.configuration import ConfigError, from_mapping, mistakes_in
from lfm_jax.training import OptimizerConfig, TrainConfig

_EXAMPLES = "examples"
_HELD_OUT_SHARE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstRun:
    """A run that goes cold: a model, and reinforcement learning of it. Where the latter starts from is filled in."""

    pretrain: pretrain.Config
    rl: rl.Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """run: the workdir of a run of reinforcement learning that has a cold.json; or else first: what makes one.

    source: of the examples: "solutions", the generator's worked ones; "rollouts", what the run's own policy got right, in its
      probes or in the rollouts that are kept. conversations: of each cold environment, at most. A tenth of their questions is
      held out of the fine-tuning; where that would be none or all of an environment's, as few as can be.
    loader, optimizer, train: of the fine-tuning, which starts from the run's model.
    rl_steps: of the reinforcement learning after it, which has the run's settings otherwise, but the next `train.seed`,
      by which it draws other problems than the examples; None: as many as the run had.
    """

    run: str | None = None
    first: FirstRun | None = None
    source: Literal["solutions", "rollouts"] = "solutions"
    conversations: int = 256
    loader: LoaderConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    rl_steps: int | None = None

    def __post_init__(self):
        if (self.run is None) == (self.first is None):
            raise ValueError("give run, the workdir of a run that has gone cold, or else first, the settings of what makes one")
        if self.conversations < 2:
            raise ValueError(f"conversations must be at least 2, one of which is held out, got {self.conversations}")
        if self.rl_steps is not None and self.rl_steps < 1:
            raise ValueError(f"rl_steps must be at least 1, or None, got {self.rl_steps}")


def main(config: Config, workdir: epath.Path) -> None:
    """Writes examples/, runs sft/ and rl/, each a workdir of its own that is resumed where it stopped, and compares the runs.

    Where there is no run yet, pretrain/ and first_rl/ come before them.
    """
    run = _first_run(config.first, workdir) if config.run is None else epath.Path(config.run)
    before, cold = _read(run)
    counts = {name: _write_examples(config, run, before, name, about, workdir) for name, about in cold.items()}
    tuned = sft.Config(
        init_from=str(run),
        data=ConversationSources(
            sources=tuple(str(_file(workdir, name)) for name in cold), held_out_share=_held_out_share(workdir, cold),
            chat_format=before.rollouts.chat_format,
        ),
        loader=config.loader, optimizer=config.optimizer, train=config.train, compute=before.compute, mesh=before.mesh,
    )  # fmt: skip
    learned = run_stage(sft, tuned, workdir / "sft")
    after = run_stage(rl, _again(before, cold, str(workdir / "sft"), config.rl_steps), workdir / "rl")
    still = _cold(workdir / "rl")
    rows = [
        {"environment": name, "difficulty": about["difficulty"], "verdict": about["verdict"], "examples": counts[name],
         "accuracy_after_sft": _of(after, "accuracy", name, "_before"), "accuracy_after_rl": _of(after, "accuracy", name),
         "is_cold": name in still}
        for name, about in cold.items()
    ]  # fmt: skip
    first = json.loads((run / FILE).read_text()) if (run / FILE).exists() else {}
    write_results(
        workdir,
        {
            **_compared("accuracy", first, after), **_compared("tail_loop", first, after),
            "sft_nll_per_token": learned["nll_per_token"], "cold": len(cold), "cold_after": len(still), "environments": rows,
        },
        config,
    )  # fmt: skip


def _first_run(first: FirstRun, workdir: epath.Path) -> epath.Path:
    """Its workdir."""
    run_stage(pretrain, first.pretrain, workdir / "pretrain")
    run_stage(rl, dataclasses.replace(first.rl, init_from=str(workdir / "pretrain")), workdir / "first_rl")
    return workdir / "first_rl"


def _read(run: epath.Path) -> tuple[rl.Config, dict[str, Any]]:
    """The run's settings, and what is known of its cold environments, by name."""
    cold = _cold(run)
    if not cold:
        raise ConfigError(f"--config.run: {run} has no cold environment in {COLD}; there is nothing to be started")
    settings = json.loads((run / "config.json").read_text())
    known = {field.name for field in dataclasses.fields(rl.Config)}
    return from_mapping(rl.Config, {name: value for name, value in settings.items() if name in known}), cold


def _cold(run: epath.Path) -> dict[str, Any]:
    path = run / COLD
    return json.loads(path.read_text())["environments"] if path.exists() else {}


def _again(before: rl.Config, cold: dict[str, Any], init_from: str, steps: int | None) -> rl.Config:
    """The run's settings from another model on, with other problems than those of the run and of the examples; what was cold
    begins with the difficulty at which it was."""
    found = [source_named(name, before.environments.max_turns).name for name in before.environments.names]
    starts = before.environments.difficulties or (1,) * len(found)
    difficulties = tuple(cold[name]["difficulty"] if name in cold else start for name, start in zip(found, starts, strict=True))
    return dataclasses.replace(
        before,
        init_from=init_from,
        environments=dataclasses.replace(before.environments, difficulties=difficulties),
        train=dataclasses.replace(before.train, steps=steps or before.train.steps, seed=before.train.seed + 1),
    )


def _file(workdir: epath.Path, name: str) -> epath.Path:
    return workdir / _EXAMPLES / f"{name.replace(':', '_').replace('/', '_')}.jsonl"


def _write_examples(
    config: Config, run: epath.Path, before: rl.Config, name: str, about: dict[str, Any], workdir: epath.Path
) -> int:
    """Writes the conversations of an environment, and returns how many they are."""
    if config.source == "solutions":
        with mistakes_in("source"):
            sources = [source_named(each, before.environments.max_turns) for each in before.environments.names]
            (source,) = (each for each in sources if each.name == name)
            examples = list(_solutions(source, about["difficulty"], config.conversations))
    else:
        examples = list(itertools.islice(_right_rollouts(run, name, about), config.conversations))
        if len(examples) < 2:
            raise ConfigError(
                f"--config.source: {len(examples)} of the answers in {name} that are kept were right; an absent skill is learnt "
                "from source=solutions"
            )
    path = _file(workdir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        part = path.parent / f".{path.name}"
        part.write_text("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))
        part.replace(path)
    return len(examples)


def _held_out_share(workdir: epath.Path, names: Iterable[str]) -> float:
    """By which each environment's examples have questions of both splits.

    Raises:
      ConfigError: there is none: an environment has too few questions.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("examples")  # the first process writes them
    fractions = {}
    for name in names:
        where = ConversationsConfig(source=str(_file(workdir, name)), held_out_share=1.0)
        with mistakes_in("source"):
            fractions[name] = {split_fraction(example.messages) for example in read_conversations(where, "held_out")}
    if all(min(each) < _HELD_OUT_SHARE <= max(each) for each in fractions.values()):
        return _HELD_OUT_SHARE
    least = max(map(min, fractions.values()))  # must be held out, and is with any share above
    share = min((fraction for each in fractions.values() for fraction in each if fraction > least), default=1.0)
    without = [name for name, each in fractions.items() if max(each) < share]
    if without:
        raise ConfigError(
            f"--config.source: the examples in {without[0]} are of so few different questions, {len(fractions[without[0]])}, "
            "that all would be held out and none learnt; take source=solutions, or more conversations"
        )
    return share


def _solutions(source: Source, difficulty: int, count: int) -> Iterator[dict[str, Any]]:
    """Worked ones, of training problems.

    Raises:
      ValueError: the environment has none.
    """
    for seed in range(count):
        environment = source.make()
        problem = environment.reset(seed, difficulty)
        if isinstance(environment, Shop):
            messages = solve(environment, problem)
        elif problem.solution is not None:
            messages = [*problem.messages, {"role": "assistant", "content": problem.solution}]
        else:
            raise ValueError(f"{source.name} has no worked solutions; take source=rollouts, or write them for configs/sft.py")
        yield {"messages": messages} | ({"tools": problem.tools} if problem.tools else {})


def _right_rollouts(run: epath.Path, name: str, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was right, each conversation once: what the probe found, then what is kept, the best first."""
    found = [(1.0, each["solved"], each["tools"]) for each in about["prompts"] if each["solved"]]
    for path in sorted((run / FOLDER).glob("*.jsonl")):
        for record in map(json.loads, path.read_text().splitlines()):
            right = [answer for answer in record["answers"] if (answer["parts"]["correct"] or 0) > 0]
            if record["environment"] == name:
                found += [(each["reward"], [*record["messages"], *each["messages"]], record["tools"]) for each in right]
    seen = set()
    for _, messages, tools in sorted(found, key=lambda each: -each[0]):
        key = json.dumps(messages)
        if key not in seen:
            seen.add(key)
            yield {"messages": messages} | ({"tools": tools} if tools else {})


def _compared(figure: str, first: dict[str, Any], after: dict[str, Any]) -> dict[str, float | None]:
    """Of the run, after fine-tuning and after reinforcement learning, each at every temperature."""
    found = {}
    for name in after:
        if name == figure or name.startswith(f"{figure}_at_") and not name.endswith("_before"):
            found |= {f"{name}_of_run": first.get(name), f"{name}_after_sft": after.get(f"{name}_before")}
            found[f"{name}_after_rl"] = after[name]
    return found


def _of(figures: dict[str, Any], figure: str, name: str, ending: str = "") -> float:
    """Of an environment; where there is one alone the figure has no other name."""
    return figures.get(f"{figure}_of_{name}{ending}", figures[f"{figure}{ending}"])
