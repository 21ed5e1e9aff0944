"""Reinforcement learning with verifiable rewards: a model answers, programs judge, and better answers become likelier."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from data_pipelines import TokenizerConfig
from experiments.accounting import run_accounted
from experiments.conversations import keep_template
from experiments.export import ExportConfig, check_export, export_and_check
from experiments.fine_tuning import check_low_rank, with_low_rank
from experiments.prepared_data import prepare_tokenizer
from experiments.rl.batches import RolloutBatches, Trainer
from experiments.rl.curriculum import Curriculum
from experiments.rl.environments import Source, source_named
from experiments.rl.evaluation import HeldOutProblems
from experiments.rl.making import Maker
from experiments.rl.plot import plot
from experiments.rl.sampler import Sampler
from experiments.rl.settings import (
    AdvantagesConfig,
    CurriculumConfig,
    EnvironmentsConfig,
    EvaluationConfig,
    RewardsConfig,
    RolloutsConfig,
)
from experiments.stages import TOKENIZER, Stage, load_stage, merged, mesh_for
from lfm_jax.configuration import mistakes_in, to_mapping
from lfm_jax.generation import EngineConfig
from lfm_jax.models import ComputeConfig
from lfm_jax.models.functional import Tree
from lfm_jax.models.low_rank import LowRankConfig
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import (
    OptimizerConfig,
    PolicyGradientConfig,
    TrainConfig,
    Trained,
    check_mesh,
    host_part,
    make_optimizer,
    make_policy_log_probs_step,
    make_schedule,
    overlong_penalty,
    policy_objective,
    read_metrics,
    train,
)
from lfm_jax.training.goodput import Ledger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run of reinforcement learning.

    init_from: a workdir or a Hugging Face folder, whose model is trained on, and is the reference of policy.kl_weight.
    low_rank: adapters that are trained instead of the model; None: the model is.
    environments, curriculum: what is practised, and when it gets harder. rollouts: the answers. rewards, advantages: what they
    are worth. policy: the loss. block: tokens whose logits exist at one time, on each device.
    replay_routing: of a mixture of experts, tokens go to the experts that they went to when they were drawn, whatever the router
      chooses when they are learnt from. The reference of policy.kl_weight is computed as it is.
    train: its steps are updates; rollouts.updates of them learn from a batch of rollouts.
    engine: that answers, with the rows' seq_len as its context; its prefix_bytes are for episodes of several turns.
    evaluation: of held-out problems.
    export: how the model is written at the end; None: it is not.
    """

    init_from: str
    environments: EnvironmentsConfig
    curriculum: CurriculumConfig = CurriculumConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    rewards: RewardsConfig = RewardsConfig()
    advantages: AdvantagesConfig = AdvantagesConfig()
    policy: PolicyGradientConfig = PolicyGradientConfig()
    block: int = 2048
    replay_routing: bool = False
    engine: EngineConfig = EngineConfig(prefix_bytes=1 << 28)
    evaluation: EvaluationConfig = EvaluationConfig()
    low_rank: LowRankConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    export: ExportConfig | None = None

    def __post_init__(self):
        if self.block < 1:
            raise ValueError(f"block must be at least 1 token, got {self.block}")
        if self.engine.context is not None:
            raise ValueError(f"engine.context is rollouts.seq_len here, {self.rollouts.seq_len}; leave it out")
        if self.engine.tell_routing:
            raise ValueError("engine.tell_routing is set by the model here: every mixture of experts is asked; leave it out")
        if self.rollouts.lag and self.policy.importance_cap is None:
            raise ValueError(
                "rollouts.lag is 1, so that answers are drawn by an older policy; set policy.importance_cap, about 2, which "
                "weighs them by what the policy has become"
            )
        if self.rewards.overlong_buffer is not None:
            overlong_penalty(0, max_tokens=self.rollouts.max_new_tokens, buffer=self.rewards.overlong_buffer)  # refuses
        make_schedule(self.optimizer.schedule, self.optimizer.learning_rate, self.train.steps)  # refuses what does not fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    mesh: Mesh
    stage: Stage
    sampler: Sampler
    batches: RolloutBatches
    held_out: HeldOutProblems
    environments: tuple[str, ...]


def main(config: Config, workdir: epath.Path) -> None:
    """Trains on rollouts, measures what is held out before, on the way and at the end, exports, and writes every figure."""
    run_accounted(config, workdir, lambda ledger: _prepare_and_run(config, workdir, ledger))


def _prepare_and_run(config: Config, workdir: epath.Path, ledger: Ledger) -> dict[str, Any]:
    with ledger.kind("preparation"):
        parts = _prepare(config, workdir)
    try:
        return _run(config, workdir, ledger, parts)
    finally:
        parts.batches.close()


def _prepare(config: Config, workdir: epath.Path) -> _Parts:
    check_low_rank(config)
    check_export(config.export)
    rollouts, chosen, seed = config.rollouts, config.environments, config.train.seed
    sources = _sources(config)
    starts = dict(zip(sources, chosen.difficulties or (1,) * len(sources), strict=True))
    mesh = mesh_for(config.mesh, rollouts.prompts * rollouts.answers // rollouts.mini_batches, config.train.accumulation)
    stage = load_stage(config.init_from, config.compute, mesh)
    with mistakes_in("mesh"):
        check_mesh(stage.functions, mesh)
        _check_hosts(rollouts, mesh)
    prepare_tokenizer(workdir, None, TokenizerConfig(), str(stage.tokenizer_path))
    stage = with_low_rank(config, workdir, stage, mesh)._replace(tokenizer_path=workdir / TOKENIZER)
    with mistakes_in("rollouts.seq_len"):
        _check_context(rollouts, stage)
    several_turns = any(source.task is None for source in sources.values())
    settings = dataclasses.replace(
        config.engine, context=rollouts.seq_len, prefix_bytes=config.engine.prefix_bytes if several_turns else 0,
        tell_routing=stage.config.routing_shape is not None,
    )  # fmt: skip
    with mistakes_in("replay_routing"):
        if config.replay_routing and not settings.tell_routing:
            raise ValueError(f"{config.init_from} is no mixture of experts: there is no routing to replay; leave it out")
    with mistakes_in("rollouts"):
        sampler = Sampler(rollouts, settings, stage, config.init_from, config.compute, mesh)
    keep_template(rollouts.chat_format, stage.tokenizer_path)
    weights = dict(zip(sources, chosen.weights or (1.0,) * len(sources), strict=True))
    maker = Maker(sampler.answerer, sources, weights, rollouts, config.rewards, seed)
    adaptive = dict(zip(sources, chosen.adaptive or (False,) * len(sources), strict=True))
    most = {name: source.max_difficulty for name, source in sources.items()}
    environments = tuple(sources) if len(sources) > 1 else ()  # one alone has the figures of all
    trainer = Trainer(
        mesh=mesh,
        log_probs=make_policy_log_probs_step(stage.functions, mesh, block=config.block, known=stage.config.tokenizer_vocab_size),
        needs_old=config.policy.importance_cap is not None,
        # The loop takes the arrays over that it begins with.
        reference=jax.tree.map(jnp.copy, (stage.params, stage.buffers)) if config.policy.kl_weight else None,
        model=stage.config,
        replay_routing=config.replay_routing,
        environments=environments,
    )
    batches = RolloutBatches(
        workdir, maker, sampler, Curriculum(config.curriculum, most, starts, adaptive), trainer,
        total=-(-config.train.steps // rollouts.updates), kept_states=config.train.keep_checkpoints, seed=seed,
        rollouts=rollouts, rewards=config.rewards, advantages=config.advantages, watching=config.curriculum,
    )  # fmt: skip
    temperatures = rollouts.each_temperature
    held_out = HeldOutProblems(config.evaluation, maker, sampler, starts, temperatures, mesh)
    return _Parts(mesh=mesh, stage=stage, sampler=sampler, batches=batches, held_out=held_out, environments=environments)


def _sources(config: Config) -> dict[str, Source]:
    chosen = config.environments
    with mistakes_in("environments.names"):
        found = [source_named(name, chosen.max_turns) for name in chosen.names]
        sources = {source.name: source for source in found}
        if len(sources) < len(found):
            raise ValueError(f"two environments have one name, of {', '.join(source.name for source in found)}; take one of them")
    with mistakes_in("environments.difficulties"):
        for source, difficulty in zip(found, chosen.difficulties or (1,) * len(found), strict=True):
            for each in (difficulty, *config.evaluation.difficulties):
                if not 1 <= each <= source.max_difficulty:
                    raise ValueError(f"{source.name} has difficulties 1 to {source.max_difficulty}, got {each}")
    return sources


def _check_hosts(rollouts: RolloutsConfig, mesh: Mesh) -> None:
    hosts = host_part(mesh)[1]
    if rollouts.prompts % (hosts * rollouts.mini_batches):
        raise ValueError(
            f"rollouts.prompts {rollouts.prompts} do not divide over {hosts} hosts and {rollouts.mini_batches} mini_batches, and "
            f"a group is never parted; make it a multiple of {hosts * rollouts.mini_batches}"
        )


def _check_context(rollouts: RolloutsConfig, stage: Stage) -> None:
    if rollouts.seq_len > stage.config.context_length:
        raise ValueError(f"the model's context has {stage.config.context_length} tokens, got {rollouts.seq_len}")


def _run(config: Config, workdir: epath.Path, ledger: Ledger, parts: _Parts) -> dict[str, Any]:
    stage, batches = parts.stage, parts.batches
    with ledger.kind("evaluation"):
        at_first = parts.held_out.measure(stage.params, stage.buffers)
    config.train.check_best(at_first)

    def evaluate(params: Tree, buffers: Tree) -> dict[str, float]:
        batches.settle()
        return parts.held_out.measure(params, buffers)

    trained = train(
        config.train,
        functions=stage.functions,
        optimizer=make_optimizer(config.optimizer, config.train.steps),
        objective=policy_objective(
            config.policy, block=config.block, known=stage.config.tokenizer_vocab_size, replay_routing=config.replay_routing,
            environments=parts.environments,
        ),
        batches=batches,
        mesh=parts.mesh,
        workdir=workdir,
        run_config=to_mapping(config),
        evaluate=evaluate,
        initial=(stage.params, stage.buffers),
        ledger=ledger,
    )
    return _figures(config, workdir, ledger, parts, trained, at_first)


def _figures(
    config: Config, workdir: epath.Path, ledger: Ledger, parts: _Parts, trained: Trained, at_first: dict[str, float]
) -> dict[str, Any]:
    stage = parts.stage._replace(params=trained.state.params, buffers=trained.state.buffers, step=config.train.steps)
    with ledger.kind("evaluation"):
        figures: dict[str, Any] = parts.held_out.measure(stage.params, stage.buffers)
    figures |= {f"{name}_before": value for name, value in at_first.items()}
    if config.export is not None:
        figures |= export_and_check(config.export, merged(stage, parts.mesh), workdir)
    metrics = read_metrics(workdir)
    if jax.process_index() == 0:
        plot(metrics, at_first, workdir / "rl.png")
    steps = [record for record in metrics if "train/loss" in record]
    last = {name: value for name, value in steps[-1].items() if name.startswith("train/") and math.isfinite(value)}
    gaps = [record["train/sampler_gap_max"] for record in steps if "train/sampler_gap_max" in record]
    return figures | {
        "steps": config.train.steps, "resumed_at_step": trained.started_at,
        "sampler_gap_max": max(gaps) if gaps else None, "last_step": last,
    }  # fmt: skip
