"""The runs of a sweep: trunks at a constant learning rate, and the branches that decay from them.

A warm-up-stable-decay schedule is the same for every budget until it decays. So the trunk of the longest run passes through the
states that shorter runs would be in before their decay, and these need only the decay (Hägele et al. 2024, arXiv 2405.18392). A
trunk is cut where its branches leave it; each piece, and each branch, is a run of its own that starts from another's last
checkpoint.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments import pretrain
from lfm_jax.models import ModelConfig
from lfm_jax.models.accounting import parameter_groups, training_flops_per_token
from lfm_jax.scaling import FLOPS_PER_PARAMETER_AND_TOKEN
from lfm_jax.scaling.porian import warmup_tokens

COLUMN_WIDTH = 1.1  # a run counts to an IsoFLOP column when its FLOPs are within this factor of it
_MLP_MULTIPLE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """A model, and how long it is trained.

    embed_dim, layers: its size; all else follows from the model that the sweep is given.
    multipliers: M, tokens for each parameter outside of the embedding, at which a branch ends.
    held_out: those of them that no law is fitted to. apart: those that are trained once more, from nothing, to compare.
    attention_only: every layer has full attention, and the feed-forward is as wide as makes the parameters the same.
    seed: of the parameters and of the order of the text. rate: factor of the learning rate that the rule gives.
    """

    embed_dim: int
    layers: int
    multipliers: tuple[float, ...]
    held_out: tuple[float, ...] = ()
    apart: tuple[float, ...] = ()
    attention_only: bool = False
    seed: int = 0
    rate: float = 1.0

    def __post_init__(self):
        if not self.multipliers or min(self.multipliers) <= 0 or len(set(self.multipliers)) < len(self.multipliers):
            raise ValueError(f"multipliers must be different numbers above 0, got {self.multipliers}")
        for name in ("held_out", "apart"):
            others = [each for each in getattr(self, name) if each not in self.multipliers]
            if others:
                raise ValueError(f"{name} has {others[0]:g}, which is none of multipliers: {self.multipliers}")

    @property
    def size(self) -> tuple[int, int]:
        """What the number of parameters follows from."""
        return self.embed_dim, self.layers

    @property
    def fitted(self) -> bool:
        """Whether laws are fitted to its branches: of each size, to one seed at the rate of the rule."""
        return not (self.attention_only or self.seed) and self.rate == 1

    @property
    def name(self) -> str:
        """As a folder."""
        parts = [f"{self.embed_dim}x{self.layers}", "attention" * self.attention_only]
        parts += [f"seed{self.seed}" * (self.seed > 0), f"rate{self.rate:g}" * (self.rate != 1)]
        return "-".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """How what is trained with follows from a model's size; at that of the sweep's `pretrain.model` it is as given there.

    Learning rate: for the blocks' matrices as 1 / width, for embeddings, norms and taps the same at all widths (Yang et al. 2022,
    arXiv 2203.03466, table 8, for Adam; the tied embedding's logits have no multiplier of their own, which that table asks for).
    batch_exponent: rows of a batch grow as N to this power, to the nearest power of two; all branches of a trunk have the same
      batch, so it cannot follow the number of tokens. Porian et al. 2024 find 0.7, and smaller batches cost no more here.
    warmup: tokens of warm-up for each parameter outside of the embedding (Porian et al. 2024: 1).
    """

    batch_exponent: float = 0.5
    warmup: float = 1.0


class Counts(NamedTuple):
    """Of a model. params: outside of the embedding; embedding: of it, whose matrix makes the logits as well.

    flops_per_token: of training, as the model accounts for itself, with attention and logits.
    """

    params: int
    embedding: int
    flops_per_token: float


class Run(NamedTuple):
    """A run of the sweep. name: of its folder. config: of experiments.pretrain, but for where the text is.

    parent: the run from whose last checkpoint it goes on; None: it starts from nothing. start, steps: updates of the parent's and
    at its end. multiplier: M at which it ends, None for a piece of a trunk. budget: the FLOPs of its IsoFLOP column. apart: it
    repeats a branch from nothing.
    """

    name: str
    trunk: TrunkConfig
    config: pretrain.Config
    counts: Counts
    parent: str | None
    start: int
    steps: int
    multiplier: float | None = None
    budget: float | None = None
    apart: bool = False

    @property
    def tokens(self) -> int:
        """Positions trained on when it ends, those of its parents included."""
        return self.config.loader.positions(self.steps)

    @property
    def own_tokens(self) -> int:
        """Positions that it trains on itself."""
        return self.tokens - self.config.loader.positions(self.start)

    @property
    def flops(self) -> float:
        """6 N D, with N outside of the embedding."""
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.counts.params * self.tokens

    @property
    def held_out(self) -> bool:
        """Whether it is kept from the fits, to be predicted."""
        return self.multiplier in self.trunk.held_out and self.trunk.fitted and not self.apart

    @property
    def fitted(self) -> bool:
        """Whether laws are fitted to its loss."""
        return self.multiplier is not None and self.trunk.fitted and not (self.apart or self.held_out)


@functools.cache
def count(model: ModelConfig, seq_len: int) -> Counts:
    """The parameters and FLOPs of a model, by its own account."""
    groups = parameter_groups(model)
    embedding = groups.pop("embeddings")
    return Counts(sum(groups.values()), embedding, training_flops_per_token(model, seq_len))


def model_of(base: ModelConfig, trunk: TrunkConfig) -> ModelConfig:
    """A model of the base's kind: its layers again and again, its head dimension, and its other widths in proportion.

    Raises:
      ValueError: embed_dim is no multiple of the head dimension.
    """
    if trunk.embed_dim % base.head_dim or trunk.embed_dim < 1 or trunk.layers < 1:
        raise ValueError(
            f"embed_dim={trunk.embed_dim}, layers={trunk.layers}: expected a multiple of the head dimension {base.head_dim} and "
            "at least a layer"
        )
    heads = trunk.embed_dim // base.head_dim
    most_kv_heads = max(1, heads * base.num_kv_heads // base.num_heads)
    kv_heads = next(each for each in range(most_kv_heads, 0, -1) if heads % each == 0)
    model = dataclasses.replace(
        base,
        embed_dim=trunk.embed_dim, num_heads=heads, num_kv_heads=kv_heads,
        layer_types=tuple(base.layer_types[layer % len(base.layer_types)] for layer in range(trunk.layers)),
        mlp_dim=max(1, round(base.mlp_dim * trunk.embed_dim / base.embed_dim / _MLP_MULTIPLE)) * _MLP_MULTIPLE,
    )  # fmt: skip
    return _attention_only(model) if trunk.attention_only else model


def _attention_only(model: ModelConfig) -> ModelConfig:
    """With full attention in every layer, and the feed-forward that comes nearest to the same number of parameters."""
    params = lambda model: sum(count for group, count in parameter_groups(model).items() if group != "embeddings")
    twin = dataclasses.replace(model, layer_types=("full_attention",) * model.num_layers)
    of_a_unit = 3 * model.embed_dim * model.num_layers
    return dataclasses.replace(twin, mlp_dim=model.mlp_dim + round((params(model) - params(twin)) / of_a_unit))


def runs_of(
    trunks: Sequence[TrunkConfig], budgets: Sequence[float], base: pretrain.Config, rules: RulesConfig
) -> list[Run]:
    """Every run, each after its parent.

    Args:
      budgets: FLOPs, 6 N D, of IsoFLOP columns. Each trunk that laws are fitted to gets a branch more for each budget between its
        least and its most that is not held out, unless it has one of nearly that budget. Between the others and what is held out
        it would make that easy to foresee.

    Raises:
      ValueError: two runs have the same name, or the schedule does not fit into the shortest.
    """
    runs = [run for trunk in trunks for run in _runs_of_trunk(trunk, budgets, base, rules)]
    names = [run.name for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two runs are called {twice[0]}: trunks must differ in size, seed, rate or attention_only")
    return runs


def _runs_of_trunk(trunk: TrunkConfig, budgets: Sequence[float], base: pretrain.Config, rules: RulesConfig) -> list[Run]:
    config = _config_of(trunk, base, rules)
    counts = count(config.model, config.loader.seq_len)
    runs, parent, start = [], None, 0
    ends = _ends(trunk, budgets, counts)
    for number, (end, multiplier, budget) in enumerate(ends):
        tokens = multiplier * counts.params
        branch = _lasting(config, max(1, round(tokens / config.loader.positions(1))), base.optimizer.schedule.decay_share)
        leaves = branch.train.steps - round(base.optimizer.schedule.decay_share * branch.train.steps)
        if start < leaves and number < len(ends) - 1:  # the last branch is the rest of the trunk as well
            name = f"{trunk.name}/trunk-{leaves:06d}"
            runs.append(Run(name, trunk, _lasting(config, leaves, 0.0), counts, parent, start, leaves))
            parent, start = name, leaves
        about = Run(f"{trunk.name}/{end}", trunk, branch, counts, parent, start, branch.train.steps, multiplier, budget)
        runs.append(about)
        if budget is None and multiplier in trunk.apart:
            runs.append(about._replace(name=f"{about.name}-apart", parent=None, start=0, apart=True))
    return runs


def _ends(trunk: TrunkConfig, budgets: Sequence[float], counts: Counts) -> list[tuple[str, float, float | None]]:
    """(name, M, budget) of the branches, by M."""
    ends = [(f"m{multiplier:g}", multiplier, None) for multiplier in trunk.multipliers]
    most = max((each for each in trunk.multipliers if each not in trunk.held_out), default=0.0)
    for budget in budgets if trunk.fitted else ():
        multiplier = budget / (FLOPS_PER_PARAMETER_AND_TOKEN * counts.params**2)
        near = any(1 / COLUMN_WIDTH <= each / multiplier <= COLUMN_WIDTH for each in trunk.multipliers)
        if min(trunk.multipliers) < multiplier < most and not near:
            ends.append((f"c{budget:g}", multiplier, budget))
    return sorted(ends, key=lambda end: end[1])


def _config_of(trunk: TrunkConfig, base: pretrain.Config, rules: RulesConfig) -> pretrain.Config:
    """All but how long it lasts."""
    model = model_of(base.model, trunk)
    params, of_base = (count(each, base.loader.seq_len).params for each in (model, base.model))
    doublings = round(rules.batch_exponent * math.log2(params / of_base))
    loader = dataclasses.replace(
        base.loader, batch_size=max(1, round(base.loader.batch_size * 2.0**doublings)), seed=trunk.seed, epochs=1
    )
    schedule = dataclasses.replace(
        base.optimizer.schedule, kind="wsd", warmup_steps=round(rules.warmup * warmup_tokens(params) / loader.positions(1))
    )
    optimizer = dataclasses.replace(
        base.optimizer, schedule=schedule, learning_rate=base.optimizer.learning_rate * trunk.rate,
        matrix_rate=base.optimizer.matrix_rate * base.model.embed_dim / trunk.embed_dim,
    )  # fmt: skip
    # The last step of the base's own run is not asked about, which a warm-up need not fit into.
    settings = {"model": model, "loader": loader, "optimizer": optimizer}
    train = dataclasses.replace(base.train, seed=trunk.seed, steps=max(base.train.steps, 2 * schedule.warmup_steps))
    return dataclasses.replace(base, **settings, train=train)


def _lasting(config: pretrain.Config, steps: int, decay_share: float) -> pretrain.Config:
    schedule = dataclasses.replace(config.optimizer.schedule, decay_share=decay_share)
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, schedule=schedule),
        train=dataclasses.replace(config.train, steps=steps),
    )
