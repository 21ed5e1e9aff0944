"""On-policy preference data: a model answers each prompt several times, a jury scores the answers, best and worst make a pair."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.experimental import multihost_utils
from rich.progress import track

from data_pipelines.tasks import Split
from experiments.answering import Answerer
from experiments.json_lines import write_lines
from experiments.judges import Judge, JuryConfig, absolute_score, ask, make_jury
from experiments.preference_data.files import is_made
from experiments.preference_data.pairs import Candidate, Choice, Rule, choose_pair, combined
from experiments.preference_data.prompts import Prompt, Source, fingerprint, shards
from experiments.results import write_json, write_results
from experiments.stages import load_stage
from lfm_jax.configuration import mistakes_in
from lfm_jax.generation import Completion, EngineConfig, Request, SamplingConfig
from lfm_jax.models import ComputeConfig
from lfm_jax.sharding import MeshConfig, make_mesh

_RULES: tuple[Rule, ...] = ("loop_first", "score")
_VERIFIER = "verifier"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How pairs are chosen; see `choose_pair`. rule: whose pairs are written; what the other would choose is recorded."""

    rule: Rule = "loop_first"
    acceptable: float = 0.75
    min_margin: float = 0.25
    min_agreement: float = 0.5

    def __post_init__(self):
        for field in ("acceptable", "min_margin", "min_agreement"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be from 0 to 1, got {getattr(self, field)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: the policy, a workdir or a Hugging Face folder.

    tasks, prompts, difficulties, conversations, held_out_share, split, seed: what it is asked (see `Source`).
    chat_format: as in `ConversationSources`. samples, greedy: answers to each prompt that are drawn, and whether there is one
    more of the most likely tokens. temperature, top_p: of the draws. max_new_tokens: of each answer.
    judges: besides the tasks' verifiers. pairs: how they are chosen. shard_size: prompts that are answered, judged and written
    together, and lost together when the run is killed. mesh: over the devices of one host.
    """

    init_from: str
    tasks: tuple[str, ...] = ()
    prompts: int = 1000
    difficulties: tuple[int, ...] = ()
    conversations: tuple[str, ...] = ()
    held_out_share: float = 0.05
    split: Split = "train"
    chat_format: str = "auto"
    samples: int = 5
    greedy: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    judges: JuryConfig = JuryConfig()
    pairs: PairConfig = PairConfig()
    shard_size: int = 256
    engine: EngineConfig = EngineConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    def __post_init__(self):
        if not (self.tasks or self.conversations) or self.prompts < 1:
            raise ValueError("nothing is asked: give tasks, conversations or both, and at least one prompt")
        if self.samples + self.greedy < 2 or self.shard_size < 1:
            raise ValueError(
                "a pair needs two answers to a prompt and a shard one prompt, got "
                f"{self.samples} samples, greedy {self.greedy} and shard_size {self.shard_size}"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}: without it all answers are the greedy one")
        if self.conversations and self.pairs.acceptable > 0 and not self.judges.endpoints:
            raise ValueError(
                "conversations have no reference, so somebody must say what is acceptable: give judges.endpoints, or "
                "pairs.acceptable=0"
            )
        SamplingConfig(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)  # refuses

    @property
    def source(self) -> Source:
        """What is asked."""
        return Source(
            self.tasks, self.prompts, self.difficulties, self.conversations, self.held_out_share, self.split, self.seed
        )


def main(config: Config, workdir: epath.Path) -> None:
    """Writes rollouts/, pairs/ and counts/, a file for each shard; process i of n makes every n-th. What is there is kept."""
    with mistakes_in("mesh"):
        mesh = make_mesh(config.mesh, jax.local_devices())
    stage = load_stage(config.init_from, config.compute, mesh)
    policy = _Policy(config, Answerer(stage, config.chat_format, config.engine, mesh))
    jury = make_jury(config.judges, config.compute, config.mesh)
    for folder in ("rollouts", "pairs", "counts"):
        (workdir / folder).mkdir(parents=True, exist_ok=True)
    made = total = 0
    before: concurrent.futures.Future | None = None
    with concurrent.futures.ThreadPoolExecutor(1) as judging:  # judges elsewhere are waited for while the policy goes on
        for number, prompts in track(enumerate(_asked(config)), description="shards"):
            total += 1
            if number % jax.process_count() != jax.process_index():
                continue
            about = {"policy": config.init_from, "policy_step": stage.step, "prompts": fingerprint(prompts)}
            if not is_made(workdir / "counts" / f"{number:06d}.json", about):
                begin = time.monotonic()
                answers = policy.answer(prompts)
                seconds = time.monotonic() - begin
                if before is not None:
                    before.result()
                before = judging.submit(_judge_shard, config, workdir, f"{number:06d}", prompts, answers, jury, about, seconds)
                if config.judges.likelihoods:  # two threads would hand programs to the same devices, and each wait for the other
                    before.result()
                made += 1
        if before is not None:
            before.result()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("preference data")
    write_results(workdir, _figures(config, workdir, total) | {"checkpoint_step": stage.step, "shards_made_now": made}, config)


def _asked(config: Config) -> Iterator[list[Prompt]]:
    """The prompts of each shard. What is wrong with them is a mistake in the settings; what fails elsewhere is not."""
    waiting = shards(config.source, config.shard_size)
    while True:
        with mistakes_in("tasks, conversations or difficulties"):
            prompts = next(waiting, None)
        if prompts is None:
            return
        yield prompts


def answer_seed(seed: int, prompt: int, rollout: int) -> int:
    """Of an answer's draws: the same for the same run, prompt and rollout, whatever else is asked. 32 bits."""
    return int.from_bytes(hashlib.blake2b(json.dumps([seed, prompt, rollout]).encode(), digest_size=4).digest(), "little")


class _Answered(NamedTuple):
    """prompt_ids: as the policy was given it. answers: in the form of their records."""

    prompt_ids: tuple[int, ...]
    answers: list[dict[str, Any]]


class _Policy:
    """The model that answers."""

    def __init__(self, config: Config, answerer: Answerer):
        self._config, self._answerer = config, answerer

    def answer(self, prompts: Sequence[Prompt]) -> list[_Answered | str]:
        """The answers to each prompt; or why there are none."""
        asked = self._answerer.prompts([prompt.conversation for prompt in prompts], self._config.max_new_tokens)
        requests: list[list[Request] | str] = [
            ids if isinstance(ids, str) else self._requests(prompt, ids) for prompt, ids in zip(prompts, asked, strict=True)
        ]
        every = [request for each in requests if not isinstance(each, str) for request in each]
        found = iter(self._answerer.engine.run(every))
        told = lambda each: _Answered(each[0].prompt, [self._told(request, next(found)) for request in each])
        return [each if isinstance(each, str) else told(each) for each in requests]

    def _requests(self, prompt: Prompt, ids: tuple[int, ...]) -> list[Request]:
        config = self._config
        draw = SamplingConfig(temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.max_new_tokens)
        each = [
            dataclasses.replace(draw, seed=answer_seed(config.seed, prompt.number, rollout)) for rollout in range(config.samples)
        ]
        each += [dataclasses.replace(draw, temperature=0.0)] * config.greedy
        return [self._answerer.request(ids, sampling) for sampling in each]

    def _told(self, request: Request, completion: Completion) -> dict[str, Any]:
        kind = "sampled" if request.sampling.temperature else "greedy"
        return {"kind": kind, "seed": request.sampling.seed, **self._answerer.told(completion)}


def _judge_shard(
    config: Config, workdir: epath.Path, name: str, prompts: list[Prompt], answers: list[_Answered | str],
    jury: Sequence[Judge], about: Mapping[str, Any], seconds_generating: float,
) -> None:  # fmt: skip
    """Has the answers judged, and writes the shard. The file of counts comes last: a shard is there if that is."""
    begin = time.monotonic()
    usable = [(prompt, each) for prompt, each in zip(prompts, answers, strict=True) if not isinstance(each, str)]
    texts = [[answer["text"] for answer in each.answers] for _, each in usable]
    conversations = [prompt.conversation for prompt, _ in usable]
    keys = [[config.seed, prompt.number] for prompt, _ in usable]
    opinions = {judge.name: iter(ask(judge, conversations, texts, keys)) for judge in jury}
    seconds = {"seconds_generating": seconds_generating, "seconds_judging": time.monotonic() - begin}
    records = []
    for prompt, each in zip(prompts, answers, strict=True):
        record = {
            "number": prompt.number, "source": prompt.about, "messages": list(prompt.conversation.messages),
            "tools": list(prompt.conversation.tools), "reference": prompt.reference, **about,
        }  # fmt: skip
        if isinstance(each, str):
            records.append(record | {"responses": [], "not_answered": each})
            continue
        verdicts = {judge: next(found) for judge, found in opinions.items()}
        records.append(record | {"prompt_ids": each.prompt_ids} | _judged(config, prompt, each.answers, verdicts, jury))
    write_lines(workdir / "rollouts" / f"{name}.jsonl", records)
    write_lines(workdir / "pairs" / f"{name}.jsonl", [_pair(record, config.pairs.rule) for record in records])
    write_json(workdir / "counts" / f"{name}.json", {**about, "counts": _counts(config, records) | seconds})


def _judged(
    config: Config, prompt: Prompt, answers: list[dict[str, Any]], verdicts: Mapping[str, Any], jury: Sequence[Judge]
) -> dict[str, Any]:
    """The fields of a record about its answers, what was said of them, and which two were chosen."""
    scores = {name: found.scores for name, found in verdicts.items()}
    if prompt.task is not None:
        for answer in answers:
            answer["parts"] = prompt.task.score(answer["text"], prompt.reference)
        scores[_VERIFIER] = [_verified(answer["parts"]) for answer in answers]
    candidates = []
    for index, (answer, total) in enumerate(zip(answers, combined(scores) if scores else [None] * len(answers), strict=True)):
        parts = answer.setdefault("parts", None)
        known = [absolute_score(jury, verdicts, index), _mean(parts) if parts else None]
        acceptable = _mean(dict(enumerate(known)))
        right = None if parts is None or parts["correct"] is None else parts["correct"] == 1
        answer |= {"score": total, "right": right, "acceptable": acceptable}
        ended = answer["finish_reason"] == "stop"
        candidates.append(Candidate(answer["text"], ended, answer["ending"] == "tail_loop", right, acceptable))
    pairs, limits = config.pairs, dataclasses.asdict(config.pairs)
    del limits["rule"]
    choices = {rule: choose_pair(candidates, scores, rule, **limits)._asdict() for rule in _RULES}
    judged = {name: found._asdict() for name, found in verdicts.items()}
    return {"responses": answers, "judges": judged, "choices": choices, "choice": choices[pairs.rule]}


def _mean(parts: Mapping[Any, float | None]) -> float | None:
    known = [part for part in parts.values() if part is not None]
    return sum(known) / len(known) if known else None


def _verified(parts: Mapping[str, float | None]) -> float | None:
    """What is right comes before what looks right: without that, form alone would weigh as much as the answer."""
    mean, correct = _mean(parts), parts["correct"]
    return mean if correct is None or mean is None else (correct + mean) / 2


def _pair(record: Mapping[str, Any], rule: Rule) -> dict[str, Any] | None:
    """In TRL's conversational format."""
    choice = Choice(**record["choices"][rule]) if record["responses"] else None
    if choice is None or choice.outcome != "pair":
        return None
    said = lambda number: [{"role": "assistant", "content": record["responses"][number]["text"]}]
    pair = {"prompt": record["messages"], "chosen": said(choice.chosen), "rejected": said(choice.rejected)}
    return pair | ({"tools": record["tools"]} if record["tools"] else {})


def _counts(config: Config, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers that add up over shards."""
    counts: collections.Counter[str] = collections.Counter(prompts=len(records))
    for record in records:
        if not record["responses"]:
            counts[f"not_answered_{record['not_answered'].partition(':')[0]}"] += 1
            continue
        for answer in record["responses"]:
            for kind in ("all", answer["kind"]):
                counts.update({f"answers_{kind}": 1, f"tokens_{kind}": answer["tokens"], f"{answer['ending']}_{kind}": 1})
                counts[f"verified_{kind}"] += answer["right"] is not None
                counts[f"right_{kind}"] += bool(answer["right"])
        for name, found in record["judges"].items():
            counts[f"asked_{name}"] += len(found["scores"])
            counts[f"silent_{name}"] += found["scores"].count(None)
        for rule in _RULES:
            choice = record["choices"][rule]
            counts[f"{rule}_{choice['outcome']}"] += 1
            if choice["outcome"] == "pair":
                chosen, rejected = (record["responses"][choice[side]] for side in ("chosen", "rejected"))
                counts[f"{rule}_rejected_greedy"] += rejected["kind"] == "greedy"
                counts[f"{rule}_rejected_loops"] += rejected["ending"] == "tail_loop"
                counts.update({f"{rule}_chosen_tokens": chosen["tokens"], f"{rule}_rejected_tokens": rejected["tokens"]})
    return dict(counts)


def _figures(config: Config, workdir: epath.Path, total: int) -> dict[str, Any]:
    """Of all shards, whoever made them."""
    counts: collections.Counter[str] = collections.Counter()
    for number in range(total):
        counts.update(json.loads((workdir / "counts" / f"{number:06d}.json").read_text())["counts"])
    share = lambda part, whole: counts[part] / counts[whole] if counts[whole] else None
    kinds = ("all", *["sampled"] * (config.samples > 0), *["greedy"] * config.greedy)
    figures = {"prompts": counts["prompts"], "pairs": counts[f"{config.pairs.rule}_pair"], "answers": counts["answers_all"]}
    for kind in kinds:
        of_kind = "" if kind == "all" else f"_{kind}"
        figures[f"right_share{of_kind}"] = share(f"right_{kind}", f"verified_{kind}")
        for ending in ("tail_loop", "inner_loop", "limit"):
            figures[f"{ending}_share{of_kind}"] = share(f"{ending}_{kind}", f"answers_{kind}")
        figures[f"mean_tokens{of_kind}"] = share(f"tokens_{kind}", f"answers_{kind}")
    figures["tokens_per_second"] = share("tokens_all", "seconds_generating")
    figures |= {name: counts[name] for name in ("seconds_generating", "seconds_judging")}
    figures["silent_share_of_judges"] = {
        name: share(f"silent_{name}", f"asked_{name}") for name in (*config.judges.endpoints, *config.judges.likelihoods)
    }
    figures["not_answered"] = {name: counts[f"not_answered_{name}"] for name in ("refused", "too_long")}
    figures["rules"] = {rule: _of_rule(rule, counts) for rule in _RULES}
    return figures


def _of_rule(rule: Rule, counts: Mapping[str, Any]) -> dict[str, Any]:
    names = ("unscored", "all_loop", "unfinished", "not_acceptable", "equal", "small_margin", "disagreement")
    pairs = counts[f"{rule}_pair"]
    means = ("rejected_greedy", "rejected_loops", "chosen_tokens", "rejected_tokens")
    shares = dict(zip(("rejected_greedy_share", "rejected_loops_share", "chosen_mean_tokens", "rejected_mean_tokens"), means,
                      strict=True))  # fmt: skip
    of_pairs = {figure: counts[f"{rule}_{name}"] / pairs if pairs else None for figure, name in shares.items()}
    return {"pairs": pairs, "dropped": {name: counts[f"{rule}_{name}"] for name in names}} | of_pairs
