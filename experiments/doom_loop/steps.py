"""The steps of the experiment: which stage each is, what it starts from, and what it changes of the stage's settings."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from experiments import dpo, ftpo, measure_answers, preference_data, pretrain, rl, sft
from experiments.chains import run_stage, seconds_of
from experiments.preference_data import loops
from lfm_jax.configuration import from_mapping, to_mapping

STAGES = {"pretrain": pretrain, "sft": sft, "preferences": preference_data, "loops": loops, "dpo": dpo, "ftpo": ftpo, "rl": rl}


class Step(NamedTuple):
    """name: of its folder. stage: of `STAGES`. after: the step whose model it starts from; None: from nothing.
    pairs: the step that makes its pairs, or the answers that it makes pairs of. changes: of the stage's settings, by dotted
    path."""

    name: str
    stage: str
    after: str | None
    pairs: str | None = None
    changes: Mapping[str, Any] | None = None

    @property
    def measured(self) -> bool:
        """Whether a model comes of it."""
        return self.stage not in ("preferences", "loops")


CHAIN = (
    Step("pretrain", "pretrain", None),
    Step("sft", "sft", "pretrain"),
    Step("preferences", "preferences", "sft"),
    Step("dpo", "dpo", "sft", "preferences"),
    Step("rl", "rl", "dpo"),
)
_NO_PENALTY = {"rewards.ngram_penalty": 0.0, "rewards.loop_penalty": 0.0}
# The same number of answers to a prompt as with the greedy one.
_NO_GREEDY = {"samples": 6, "greedy": False}
ABLATIONS: dict[str, tuple[Step, ...]] = {
    "no_greedy_rollout": (
        Step("preferences_no_greedy", "preferences", "sft", changes=_NO_GREEDY),
        Step("dpo_no_greedy", "dpo", "sft", "preferences_no_greedy"),
    ),
    "plain_dpo": (
        Step("dpo_plain", "dpo", "sft", "preferences", {"preference.length_normalized": False, "preference.beta": 0.1}),
    ),
    "best_worst_rule": (
        Step("preferences_best_worst", "preferences", "sft", changes={"pairs.rule": "score"}),
        Step("dpo_best_worst", "dpo", "sft", "preferences_best_worst"),
    ),
    "final_token": (
        Step("loops", "loops", "sft", "preferences"),
        Step("ftpo", "ftpo", "sft", "loops"),
    ),
    "no_penalty": (Step("rl_no_penalty", "rl", "dpo", changes=_NO_PENALTY),),
    "no_dpo": (Step("rl_no_dpo", "rl", "sft"),),
    "no_dpo_no_penalty": (Step("rl_no_dpo_no_penalty", "rl", "sft", changes=_NO_PENALTY),),
    "temperature_1": (Step("rl_temperature_1", "rl", "dpo", changes={"rollouts.temperatures": [[1.0, 8]]}),),
    "no_dpo_temperature_1": (
        Step("rl_no_dpo_temperature_1", "rl", "sft", changes={"rollouts.temperatures": [[1.0, 8]]}),
    ),
}  # fmt: skip


def run_step(config: Any, workdir: epath.Path, seed: int, step: Step) -> dict[str, Any]:
    """Runs a step of a seed, and measures the model that comes of it, where that has not been done: its seconds and rows."""
    folder = workdir / f"seed_{seed}"
    changes = dict(step.changes or {}) | _places(workdir, config, seed, step)
    run_stage(STAGES[step.stage], changed(getattr(config, step.stage), changes), folder / step.name)
    rows = []
    if step.measured:
        measured = changed(config.measure, {"init_from": str(folder / step.name)})
        rows = run_stage(measure_answers, measured, folder / f"{step.name}_measured")["rows"]
    return {"seconds": seconds_of(folder / step.name), "rows": rows}


def changed(settings: Any, changes: Mapping[str, Any]) -> Any:
    """The dataclass with other values of its fields, by dotted path.

    Raises:
      ConfigError: there is no such field, or the value does not fit it.
    """
    mapping = to_mapping(settings)
    for path, value in changes.items():
        *parents, last = path.split(".")
        inner = mapping
        for name in parents:
            inner = inner[name]
        inner[last] = value
    return from_mapping(type(settings), mapping)


def _places(workdir: epath.Path, config: Any, seed: int, step: Step) -> dict[str, Any]:
    """What a stage reads, what it starts from, and its seed: draws, problems and the order of batches are others in each."""
    folder = workdir / f"seed_{seed}"
    if step.stage == "preferences":
        return {"init_from": str(folder / step.after), "seed": seed * config.preferences.prompts}
    if step.stage == "loops":
        return {"init_from": str(folder / step.after), "rollouts": str(folder / step.pairs)}
    places: dict[str, Any] = {"train.seed": seed}
    if step.stage == "pretrain":
        places |= {"tokens_from": [str(workdir / "text")], "loader.seed": seed}
    else:
        places["init_from"] = str(folder / step.after)
    if step.stage == "sft":
        files = workdir / "conversations" / "conversations"
        places |= {"data.sources": [str(files / f"{name}.jsonl") for name in config.conversations.tasks], "loader.seed": seed}
    if step.stage == "dpo":
        places |= {"data.sources": [str(folder / step.pairs / "pairs")], "loader.seed": seed}
    if step.stage == "ftpo":
        places |= {"pairs": str(folder / step.pairs / loops.FOLDER), "loader.seed": seed}
    return places
