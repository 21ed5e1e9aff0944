"""Pairs for final-token preference optimisation: where answers of a run of preference data began to loop, and what else could
have stood there."""

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from rich.progress import track

from experiments.answering import Answerer
from experiments.json_lines import read_lines, write_lines
from experiments.preference_data.files import is_made
from experiments.results import write_json, write_results
from experiments.stages import load_stage
from lfm_jax.configuration import ConfigError, mistakes_in
from lfm_jax.generation import MOST_TOP_LOG_PROBS, Completion, EngineConfig, Request, SamplingConfig
from lfm_jax.generation.loops import Loop, inner_loop, tail_loop
from lfm_jax.models import ComputeConfig
from lfm_jax.sharding import MeshConfig, make_mesh

FOLDER = "loops"
_MOST_SHOWN = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: the policy that is asked what else could stand there, a workdir or a Hugging Face folder.

    rollouts: the workdir of the run of preference data whose answers are looked through.
    alternatives: at most so many of the policy's most likely tokens at the place are chosen. min_probability: that the policy
    gives each of them at least; the original has no such limit (0), but what nobody would say is no alternative. mesh: over the
    devices of one host.
    """

    init_from: str
    rollouts: str
    alternatives: int = MOST_TOP_LOG_PROBS
    min_probability: float = 1e-3
    engine: EngineConfig = EngineConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if not 1 <= self.alternatives <= MOST_TOP_LOG_PROBS:
            raise ValueError(f"alternatives must be in 1..{MOST_TOP_LOG_PROBS}, which the engine tells, got {self.alternatives}")
        if not 0 <= self.min_probability < 1:
            raise ValueError(f"min_probability must be at least 0 and less than 1, got {self.min_probability}")


def main(config: Config, workdir: epath.Path) -> None:
    """Writes loops/ and counts/, a file for each shard of rollouts; process i of n makes every n-th. What is there is kept."""
    with mistakes_in("mesh"):
        mesh = make_mesh(config.mesh, jax.local_devices())
    names = _shards(config)
    stage = load_stage(config.init_from, config.compute, mesh)
    answerer = Answerer(stage, "auto", config.engine, mesh)
    about = {"policy": config.init_from, "policy_step": stage.step, "tokenizer": stage.tokenizer.fingerprint}
    never = {stage.tokenizer.pad_id, stage.tokenizer.bos_id, *range(stage.tokenizer.vocab_size, stage.config.vocab_size)}
    for folder in (FOLDER, "counts"):
        (workdir / folder).mkdir(parents=True, exist_ok=True)
    made = 0
    for name in track(names[jax.process_index() :: jax.process_count()], description="shards"):
        path = epath.Path(config.rollouts) / "rollouts" / f"{name}.jsonl"
        of_shard = about | {"rollouts": hashlib.sha256(path.read_bytes()).hexdigest()}
        if not is_made(workdir / "counts" / f"{name}.json", of_shard):
            _make_shard(config, workdir, name, read_lines(path), answerer, never, of_shard)
            made += 1
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("loops")
    write_results(workdir, _figures(workdir, names, answerer) | {"checkpoint_step": stage.step, "shards_made_now": made}, config)


def _shards(config: Config) -> list[str]:
    """Those that are whole."""
    folder = epath.Path(config.rollouts) / "counts"
    names = sorted(path.stem for path in folder.glob("*.json") if not path.name.startswith(".")) if folder.exists() else []
    if not names:
        raise ConfigError(
            f"--config.rollouts={config.rollouts}: no shard of rollouts is there; give the workdir of a run of "
            "configs/preference_data.py"
        )
    return names


def looping_place(tokens: Sequence[int]) -> tuple[Loop, int] | None:
    """The loop of an answer's tokens, [n], and where its second repetition begins; None: it has none.

    The first inner loop, as antidoom takes it, or else the tail loop, which may be shorter.
    """
    loop = inner_loop(tokens) or tail_loop(tokens)
    return loop and (loop, loop.start + loop.period)


def loops_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The places where answers of a record of rollouts began to loop, each once however many answers have it.

    prefix_ids: all before the place, the prompt included. rejected: the id there. responses: the numbers of the answers;
    kinds, seeds: how they were drawn. loop: of the first of them, counted from the answer's first token.
    """
    found: dict[tuple[tuple[int, ...], int], dict[str, Any]] = {}
    for number, answer in enumerate(record["responses"]):
        tokens = answer["token_ids"]
        looping = looping_place(tokens)
        if looping is None:
            continue
        loop, place = looping
        prefix, rejected = (*record["prompt_ids"], *tokens[:place]), tokens[place]
        of_place = found.setdefault(
            (prefix, rejected),
            {"responses": [], "kinds": [], "seeds": [], "loop": loop._asdict(), "prefix_ids": prefix, "rejected": rejected},
        )
        for field, value in (("responses", number), ("kinds", answer["kind"]), ("seeds", answer["seed"])):
            of_place[field].append(value)
    return list(found.values())


def _make_shard(
    config: Config, workdir: epath.Path, name: str, rollouts: list[dict[str, Any]], answerer: Answerer, never: set[int],
    about: Mapping[str, Any],
) -> None:  # fmt: skip
    """The file of counts comes last: a shard is there if that is."""
    places = [(record, place) for record in rollouts for place in loops_of(record)]
    for record, place in places:
        _check_tokenizer(config, record, place, answerer)
    one = SamplingConfig(temperature=0.0, max_new_tokens=1)
    requests = [Request(prompt=place["prefix_ids"], sampling=one, top_log_probs=MOST_TOP_LOG_PROBS) for _, place in places]
    with mistakes_in("engine"):
        completions = answerer.engine.run(requests)
    records = [
        _record(config, record, place, found, answerer, never) | about
        for (record, place), found in zip(places, completions, strict=True)
    ]
    counts = collections.Counter(
        prompts=len(rollouts), answers=sum(len(record["responses"]) for record in rollouts),
        looping=sum(len(place["responses"]) for _, place in places), places=len(places),
    )  # fmt: skip
    for record in records:
        if record["chosen"]:
            ends = any(chosen["token"] in answerer.stop_ids for chosen in record["chosen"])
            rejected = f"id_{record['rejected']['token']}"
            counts.update({"pairs": 1, "chosen": len(record["chosen"]), "ends": int(ends), rejected: 1})
    write_lines(workdir / FOLDER / f"{name}.jsonl", [record for record in records if record["chosen"]])
    write_json(workdir / "counts" / f"{name}.json", {**about, "counts": counts})


def _check_tokenizer(config: Config, record: Mapping[str, Any], place: Mapping[str, Any], answerer: Answerer) -> None:
    answer = record["responses"][place["responses"][0]]
    if max(answer["token_ids"]) >= answerer.engine.config.vocab_size or answerer.text(answer["token_ids"]) != answer["text"]:
        raise ConfigError(
            f"--config.init_from={config.init_from}: its tokenizer does not read answer {place['responses'][0]} to prompt "
            f"{record['number']} of {config.rollouts} as it was written; ask a policy with the same tokenizer"
        )


def _record(
    config: Config, record: Mapping[str, Any], place: dict[str, Any], found: Completion, answerer: Answerer, never: set[int]
) -> dict[str, Any]:
    """What training reads, and where it is from. A token that is not among the policy's likely ones has the log_prob None."""
    (top,) = found.top
    log_probs = dict(top)
    told = lambda token: {"token": token, "text": _spelled(token, answerer), "log_prob": log_probs.get(token)}
    likely = [token for token, log_prob in top if math.exp(log_prob) >= config.min_probability and token not in never]
    chosen = [token for token in likely if token != place["rejected"]][: config.alternatives]
    origin = {name: record[name] for name in ("number", "source", "messages", "tools")}
    made_by = {"rollouts_policy": record["policy"], "rollouts_policy_step": record["policy_step"]}
    return {**origin, **made_by, **place, "rejected": told(place["rejected"]), "chosen": [told(token) for token in chosen]}


def _spelled(token: int, answerer: Answerer) -> str:
    symbols = {number: symbol for symbol, number in answerer.encoder.symbols.items()}
    return symbols.get(token) or answerer.text([token])


def _figures(workdir: epath.Path, names: Sequence[str], answerer: Answerer) -> dict[str, Any]:
    """Of all shards, whoever made them."""
    counts: collections.Counter[str] = collections.Counter()
    for name in names:
        counts.update(json.loads((workdir / "counts" / f"{name}.json").read_text())["counts"])
    share = lambda part, whole: counts[part] / counts[whole] if counts[whole] else None
    rejected = collections.Counter({int(name[3:]): count for name, count in counts.items() if name.startswith("id_")})
    frequent = rejected.most_common(_MOST_SHOWN)
    return {
        "prompts": counts["prompts"], "answers": counts["answers"], "loop_share": share("looping", "answers"),
        "places": counts["places"], "pairs": counts["pairs"], "without_alternative": counts["places"] - counts["pairs"],
        "mean_alternatives": share("chosen", "pairs"), "pairs_with_an_end_share": share("ends", "pairs"),
        "distinct_rejected": len(rejected),
        "rejected": [{"token": token, "text": _spelled(token, answerer), "pairs": pairs} for token, pairs in frequent],
    }  # fmt: skip
