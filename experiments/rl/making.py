"""How a batch of rollouts comes to be: problems are drawn and answered, answers scored, groups without variance replaced."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.conversations import Conversation
from data_pipelines.tasks import Environment, Problem, Split, pick
from experiments.answering import Answerer
from experiments.rl.curriculum import pass_at_k
from experiments.rl.environments import Source
from experiments.rl.episodes import Episode, play
from experiments.rl.records import encoded_bits, encoded_routing
from experiments.rl.rewards import rewards_of, varied
from experiments.rl.settings import CurriculumConfig, RewardsConfig, RolloutsConfig
from lfm_jax.configuration import ConfigError

_MOST_PROBLEMS = 8  # that are drawn until one has room
# Where seeds of problems begin: small, as reasoning-gym multiplies them and some of its generators take 32 bits.
_RUN = 1 << 20  # of a run, for each number of train.seed
_NEXT = 1 << 26  # of the next problem where one had no room
_PROBE = 1 << 29  # of probes


class Maker:
    """Makes records of rollouts by whatever parameters the engine has.

    Args:
      sources: environments by name; weights: their shares. seed: of everything that is drawn.
    """

    def __init__(
        self, answerer: Answerer, sources: Mapping[str, Source], weights: Mapping[str, float], rollouts: RolloutsConfig,
        rewards: RewardsConfig, seed: int,
    ):  # fmt: skip
        self._answerer, self._sources, self._weights = answerer, dict(sources), dict(weights)
        self._rollouts, self._rewards, self._seed = rollouts, rewards, seed

    def records(self, batch: int, slots: range, difficulties: Mapping[str, int]) -> list[dict[str, Any]]:
        """A prompt with its answers for each slot: the first of the slot's prompts whose answers differ in their rewards, or its
        first one. So it is the same on whichever host it is made."""
        chosen: dict[int, dict[str, Any]] = {}
        waiting: Sequence[int] = slots
        for round_number in range(1 + self._rollouts.extra_rounds):
            for record in self._round(batch, round_number, waiting, difficulties):
                if record["slot"] not in chosen or varied(record["answers"]):
                    chosen[record["slot"]] = record
            for slot in waiting:
                chosen[slot]["rounds"] = round_number + 1
            waiting = [slot for slot in waiting if not varied(chosen[slot]["answers"])]
            if not waiting:
                break
        return [chosen[slot] for slot in slots]

    def _round(
        self, batch: int, round_number: int, slots: Sequence[int], difficulties: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        """All answers to a prompt for each of the slots."""
        first = ((batch - 1) * (1 + self._rollouts.extra_rounds) + round_number) * self._rollouts.prompts
        seeds = [self._seed * _RUN + first + slot for slot in slots]
        names = [pick(self._weights, seed) for seed in seeds]
        wanted = [(name, seed, difficulties[name]) for name, seed in zip(names, seeds, strict=True)]
        records, groups = [], []
        for slot, name, drawn in zip(slots, names, self._draw(wanted, "train", self._rollouts.answers), strict=True):
            key = (self._seed, batch, round_number, slot)
            groups.append([
                Episode(environment, drawn["problem"], drawn["prompt"], temperature, (*key, answer))
                for answer, (environment, temperature)
                in enumerate(zip(drawn["environments"], self._rollouts.each_temperature, strict=True))
            ])  # fmt: skip
            problem: Problem = drawn["problem"]
            records.append({
                "batch": batch, "slot": slot, "environment": name, "difficulty": difficulties[name], "seed": drawn["seed"],
                "left_out": drawn["left_out"], "messages": problem.messages, "tools": problem.tools,
                "reference": problem.reference, "prompt_ids": list(drawn["prompt"]),
            })  # fmt: skip
        play([episode for group in groups for episode in group], self._answerer, self._rollouts)
        return [record | {"answers": [self._told(each) for each in group]} for record, group in zip(records, groups, strict=True)]

    def _told(self, episode: Episode) -> dict[str, Any]:
        told = episode.told() | {
            "log_probs": episode.log_probs, "kept": encoded_bits(episode.kept), "routing": encoded_routing(episode.routing),
        }  # fmt: skip
        return told | rewards_of(self._rewards, told, episode.turns, self._rollouts.max_new_tokens)

    def _draw(self, wanted: Sequence[tuple[str, int, int]], split: Split, count: int) -> list[dict[str, Any]]:
        """For each (environment, seed, difficulty) a problem whose prompt has room, its ids, and as many environments in which it
        is to be solved."""
        found: dict[int, dict[str, Any]] = {}
        for attempt in range(_MOST_PROBLEMS):
            begun = {
                place: (seed + attempt * _NEXT, *_begun(self._sources[name], seed + attempt * _NEXT, difficulty, split, count))
                for place, (name, seed, difficulty) in enumerate(wanted)
                if place not in found
            }
            asked = [
                Conversation(problem.messages, problem.tools or (), f"{wanted[place][0]}, seed {at}")
                for place, (at, _, problem) in begun.items()
            ]
            prompts = self._answerer.prompts(asked, self._rollouts.max_new_tokens)
            for (place, (at, environments, problem)), prompt in zip(begun.items(), prompts, strict=True):
                if isinstance(prompt, str):
                    (name, _, difficulty), reason = wanted[place], prompt
                    continue
                found[place] = {
                    "environments": environments, "problem": problem, "prompt": prompt, "seed": at, "left_out": attempt,
                }  # fmt: skip
            if len(found) == len(wanted):
                return [found[place] for place in range(len(wanted))]
        raise ConfigError(
            f"--config.rollouts: of {_MOST_PROBLEMS} problems of {name} at difficulty {difficulty} none can be asked: {reason}; "
            "raise seq_len, lower max_new_tokens, or take another difficulty"
        )

    def held_out(self, wanted: Sequence[tuple[str, int, int, int, float]]) -> list[dict[str, Any]]:
        """The answers to held-out problems, each of (environment, number, seed, difficulty, temperature): all together."""
        drawn_ones = self._draw([(name, seed, difficulty) for name, _, seed, difficulty, _ in wanted], "held_out", 1)
        episodes = []
        for (name, number, *_, temperature), drawn in zip(wanted, drawn_ones, strict=True):
            key = (self._seed, "held_out", name, number)
            episodes.append(Episode(drawn["environments"][0], drawn["problem"], drawn["prompt"], temperature, key))
        play(episodes, self._answerer, self._rollouts)
        return [episode.told() for episode in episodes]

    def probe(self, config: CurriculumConfig, name: str, difficulty: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Many answers, at temperature 1, to each of these fixed problems: `right` of `samples`, and a right conversation."""
        groups = []
        wanted = [(name, _PROBE + number, difficulty) for number in numbers]
        for number, drawn in zip(numbers, self._draw(wanted, "train", config.probe_samples), strict=True):
            key = (self._seed, "probe", name, difficulty, number)
            groups.append((drawn, [
                Episode(environment, drawn["problem"], drawn["prompt"], 1.0, (*key, sample))
                for sample, environment in enumerate(drawn["environments"])
            ]))  # fmt: skip
        play([episode for _, group in groups for episode in group], self._answerer, self._rollouts)
        found = []
        for drawn, group in groups:
            right = [episode for episode in group if (episode.environment.score()["correct"] or 0) > 0]
            solved = [*drawn["problem"].messages, *right[0].messages] if right else None
            found.append({
                "seed": drawn["seed"], "samples": len(group), "right": len(right), "solved": solved,
                "tools": drawn["problem"].tools,
            })  # fmt: skip
        return found


def probe_figures(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """pass_at_K, the mean over the prompts, for K of 1, 4, 16, ... up to the samples; and the verdict."""
    samples = found[0]["samples"]
    powers = [4**power for power in range(samples.bit_length()) if 4**power < samples] + [samples]
    figures = {f"pass_at_{k}": sum(pass_at_k(samples, each["right"], k) for each in found) / len(found) for k in powers}
    return {"verdict": "rare" if any(each["right"] for each in found) else "absent", "samples": samples, **figures}


def _begun(source: Source, seed: int, difficulty: int, split: Split, count: int) -> tuple[list[Environment], Problem]:
    """As many environments that have begun the same episode."""
    environments = [source.make()]
    problem = environments[0].reset(seed, difficulty, split)
    if source.task is not None:  # a problem may take long to make, and one answer changes nothing of it
        return environments + [copy.copy(environments[0]) for _ in range(count - 1)], problem
    for _ in range(count - 1):
        environments.append(source.make())
        environments[-1].reset(seed, difficulty, split)
    return environments, problem
