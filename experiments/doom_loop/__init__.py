"""From text to a model without doom loops, stage by stage, each measured: over several seeds, and with steps left out."""

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
from etils import epath

from data_pipelines.processes import end_with_parent
from data_pipelines.tasks.numbers_game import NumbersGame
from experiments import dpo, ftpo, measure_answers, preference_data, pretrain, rl, sft, task_data, tokenize_data
from experiments.chains import run_stage
from experiments.doom_loop.figures import claims_of, markdown, plot, pooled
from experiments.doom_loop.steps import ABLATIONS, CHAIN, changed, run_step
from experiments.preference_data import loops
from experiments.results import write_results
from lfm_jax.configuration import ConfigError, nearest
from lfm_jax.host_memory import keep_freed_memory

# How the question, and then the answer, are written: as in the text that the model is pre-trained on.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '\\n' + message['content'] }}"
    "<|endoftext|>{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """seeds: so many models are trained, of seeds 0, 1, ...; ablation_seeds: of so many of them with `ablations`, names in
    `experiments.doom_loop.steps.ABLATIONS`.

    texts: rough searches of the numbers game that are pre-trained on; hard_share: of them, of its hardest problems.
    text, conversations, pretrain, sft, preferences, loops, dpo, ftpo, rl, measure: the settings of each stage and of the
      measurement; loops and ftpo are of an ablation alone. Where a stage starts from and what it reads is filled in here, and so
      is its seed.
    processes: seeds that are worked on at a time, each by a process that keeps to one core; 1: one after the other, on all cores.
    """

    seeds: int = 3
    ablation_seeds: int = 1
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    texts: int
    hard_share: float = 0.75
    text: tokenize_data.Config
    conversations: task_data.Config
    pretrain: pretrain.Config
    sft: sft.Config
    preferences: preference_data.Config
    loops: loops.Config
    dpo: dpo.Config
    ftpo: ftpo.Config
    rl: rl.Config
    measure: measure_answers.Config
    processes: int = 2

    def __post_init__(self):
        if min(self.seeds, self.texts, self.processes) < 1 or not 0 <= self.ablation_seeds <= self.seeds:
            raise ValueError(
                "seeds, texts and processes must be at least 1, and ablation_seeds from 0 to seeds, got "
                f"{self.seeds}, {self.texts}, {self.processes} and {self.ablation_seeds}"
            )
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"hard_share must be from 0 to 1, got {self.hard_share}")
        for name in self.ablations:
            if name not in ABLATIONS:
                raise ValueError(f"no ablation is named {name!r}. {nearest(name, ABLATIONS)}")
        if 0.0 not in self.measure.temperatures:
            raise ValueError(f"measure.temperatures must have 0, where loops are, got {self.measure.temperatures}")


def main(config: Config, workdir: epath.Path) -> None:
    """Runs what is not there yet of every seed's steps; writes doom_loop.md, doom_loop.png and results.json."""
    begin = time.monotonic()
    if jax.process_count() > 1:
        raise ConfigError("the doom-loop experiment is for one machine; run it as one process")
    _prepare(config, workdir)
    chains = [
        CHAIN + tuple(step for name in config.ablations for step in ABLATIONS[name]) * (seed < config.ablation_seeds)
        for seed in range(config.seeds)
    ]
    if config.processes == 1:
        found = [run_chain(config, workdir, seed, chain) for seed, chain in enumerate(chains)]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(config.processes, spawn, _begin_process, (spawn.Value("i", 0), str(workdir))) as pool:
            waiting = [pool.submit(_in_process, config, str(workdir), seed, chain) for seed, chain in enumerate(chains)]
            found = [each.result() for each in waiting]
    rows, compared, claims = pooled(found), pooled(found[: config.ablation_seeds] or found), claims_of(found)
    (workdir / "doom_loop.md").write_text(markdown(rows, compared, claims))
    plot(rows, compared, workdir / "doom_loop.png")
    write_results(workdir, _figures(found, rows, claims) | {"seconds": time.monotonic() - begin}, config)
    print((workdir / "doom_loop.md").read_text())


def _figures(found: list[dict[str, Any]], rows: list[dict[str, Any]], claims: list[dict[str, Any]]) -> dict[str, Any]:
    greedy = {row["step"]: row for row in rows if row["temperature"] == 0}
    stages = [step.name for step in CHAIN if step.measured]
    figures = {f"{stage}_{name}_share": greedy[stage][f"{name}_share"] for stage in stages for name in ("tail_loop", "right")}
    figures |= {f"{claim['step']}_fall_counts": claim["counts"] for claim in claims}
    steps = dict.fromkeys(step for of_seed in found for step in of_seed)
    seconds = {step: [of_seed[step]["seconds"] for of_seed in found if step in of_seed] for step in steps}
    return {**figures, "rows": rows, "claims": claims, "seconds_by_step": seconds}


def _prepare(config: Config, workdir: epath.Path) -> None:
    """What all seeds share: the text, its tokenizer and tokens, and the conversations with worked solutions."""
    path = workdir / "text.jsonl"
    if not path.exists():
        game = NumbersGame()
        hard = lambda number: number % 100 < 100 * config.hard_share
        part = workdir / ".text.jsonl"
        with part.open("w") as file:
            for number in range(config.texts):
                file.write(json.dumps({"text": game.rough_text(number, game.max_difficulty if hard(number) else 1)}) + "\n")
        part.replace(path)
    run_stage(tokenize_data, changed(config.text, {"data.source": str(path)}), workdir / "text")
    (workdir / "text" / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    run_stage(task_data, config.conversations, workdir / "conversations")


def run_chain(config: Config, workdir: epath.Path, seed: int, steps: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    """Of each step its seconds and, where a model came of it, the rows of its measurement; None as seconds: not known."""
    found = {}
    for step in steps:
        found[step.name] = run_step(config, workdir, seed, step)
        jax.clear_caches()  # of programs that no other step has
    return found


def _begin_process(count: Any, workdir: str) -> None:
    """Of a worker: it keeps to a core of its own, where computations do not wait for each other, and to a common store of
    compiled programs."""
    end_with_parent()
    with count.get_lock():
        number, count.value = count.value, count.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / "programs"))


def _in_process(config: Config, workdir: str, seed: int, steps: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    """`run_chain`, what it says in seed_N/log.txt."""
    folder = epath.Path(workdir) / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        sys.stdout = sys.stderr = log
        return run_chain(config, epath.Path(workdir), seed, steps)
