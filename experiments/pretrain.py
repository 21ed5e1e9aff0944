"""From text to a trained, measured and exported language model."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from data_pipelines import (
    DocumentsConfig,
    LoaderConfig,
    TokenizationConfig,
    TokenizerConfig,
    TokenShards,
    ngram_bits_per_byte,
    training_batches,
)
from experiments.accounting import run_accounted
from experiments.export import ExportConfig, check_export, export_and_check
from experiments.held_out import HeldOut
from experiments.prepared_data import PreparedText, prepare_rows, prepare_split, prepare_tokenizer, read_tokenized
from experiments.stages import (
    TOKENIZER,
    Stage,
    check_evaluation_batches,
    fit_vocabulary,
    flops_by_step,
    load_stage,
    mesh_for,
    model_functions,
    write_model_config,
)
from lfm_jax.configuration import ConfigError, mistakes_in, to_mapping
from lfm_jax.generation import Engine, Request, SamplingConfig
from lfm_jax.models import ComputeConfig, FunctionalModel, ModelConfig
from lfm_jax.models.accounting import parameter_groups
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import (
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    check_mesh,
    host_part,
    make_optimizer,
    make_schedule,
    next_token_objective,
    read_metrics,
    train,
)
from lfm_jax.training.goodput import Ledger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A pre-training run.

    init_from: a workdir or a Hugging Face folder to train on from; None: random parameters of the architecture `model`.
    data: the text, which is tokenized in the workdir as `tokenization` says. tokens_from: workdirs of tokenized text (see
      configs/tokenize_data.py), one for each source of a mixture; where they are given, `data` is not read.
    model: the architecture; None: that of init_from, which otherwise must be the same.
    tokenizer_from: a tokenizer's file or folder; None: that of init_from or tokens_from, or else one is trained as `tokenizer`
      says.
    loader: how rows and batches are made of the tokens. prompts: what samples begin with.
    evaluation_batches: held-out batches that are measured on the way; None: all. At the end it is always all.
    ngram_tokens: of the training text, that the count models to compare with are made of; None: there are none.
    export: how the model is written as a Hugging Face folder at the end; None: it is not.
    """

    init_from: str | None = None
    model: ModelConfig | None = None
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    data: DocumentsConfig | None = None
    tokenization: TokenizationConfig = TokenizationConfig()
    tokens_from: tuple[str, ...] = ()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokenizer_from: str | None = None
    loader: LoaderConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig
    evaluation_batches: int | None = None
    ngram_tokens: int | None = 1 << 26
    prompts: tuple[str, ...] = ()
    sampling: SamplingConfig = SamplingConfig()
    export: ExportConfig | None = ExportConfig()

    def __post_init__(self):
        if self.init_from is None and self.model is None:
            raise ValueError("give model, to start anew, or init_from, to go on from a trained one")
        if self.data is None and not self.tokens_from:
            raise ValueError("give data.source, the text to train on, or tokens_from, workdirs of tokenized text")
        check_evaluation_batches(self.evaluation_batches)
        make_schedule(self.optimizer.schedule, self.optimizer.learning_rate, self.train.steps)  # refuses what does not fit


def main(config: Config, workdir: epath.Path) -> None:
    """Prepares the text, trains, measures on the held-out split, samples, exports, and writes every figure."""
    run_accounted(config, workdir, lambda ledger: _run(config, workdir, ledger))


def _run(config: Config, workdir: epath.Path, ledger: Ledger) -> dict[str, Any]:
    watch = _Stopwatch()
    with ledger.kind("preparation"):
        mesh, before, text = _prepare(config, workdir)
    watch.lap("tokens")
    tokenizer = text.tokenizer
    model = fit_vocabulary(_architecture(config, before), tokenizer)
    write_model_config(workdir, model)
    functions = model_functions(model, config.compute)
    index, count = host_part(mesh)
    with mistakes_in("loader"):
        batches = training_batches(text.train, config.loader, tokenizer, process_index=index, process_count=count)
    if config.train.steps > len(batches):
        raise ConfigError(
            f"train.steps is {config.train.steps}, but loader.epochs={config.loader.epochs} of the text make {len(batches)} "
            f"batches; raise loader.epochs (None: without end), or set --config.train.steps={len(batches)}."
        )
    measure = _measure(config, text, functions, mesh)
    trained = train(
        config.train,
        functions=functions,
        optimizer=make_optimizer(config.optimizer, config.train.steps),
        objective=next_token_objective(config.loss),
        batches=batches,
        mesh=mesh,
        workdir=workdir,
        run_config=to_mapping(config),
        evaluate=lambda params, buffers: measure(params, buffers, config.evaluation_batches),
        initial=None if before is None else (before.params, before.buffers),
        flops_per_token=flops_by_step(model, config.loader),
        ledger=ledger,
    )
    watch.lap("training")
    params, buffers = trained.state.params, trained.state.buffers
    stage = Stage(model, functions, params, buffers, tokenizer, workdir / TOKENIZER, config.train.steps)
    with ledger.kind("evaluation"):
        figures = measure(params, buffers, None)
    if config.ngram_tokens is not None:
        figures |= ngram_bits_per_byte(text.train[0], text.held_out[0], tokenizer, most_tokens=config.ngram_tokens)
    watch.lap("evaluation")
    figures |= _figures_of_training(config, workdir, model, text.train)
    figures["samples"] = _samples(config, stage)
    watch.lap("samples")
    if config.export is not None:
        figures |= export_and_check(config.export, stage, workdir)
        watch.lap("export")
    return figures | {
        "seconds": sum(watch.seconds.values()), "seconds_by_part": watch.seconds, "resumed_at_step": trained.started_at
    }  # fmt: skip


def _prepare(config: Config, workdir: epath.Path) -> tuple[Mesh, Stage | None, PreparedText]:
    """The mesh, what is trained on from, and the text with its rows."""
    check_export(config.export)
    for batch_size, seq_len in config.loader.shapes():
        mesh = mesh_for(config.mesh, batch_size, config.train.accumulation, seq_len)
    before = None if config.init_from is None else load_stage(config.init_from, config.compute, mesh)
    with mistakes_in("mesh"):
        check_mesh(model_functions(_architecture(config, before), config.compute), mesh)
    text = _text(config, workdir, before)
    for _, seq_len in config.loader.shapes():
        for shards in text.train:
            prepare_rows(shards, seq_len, config.loader.fill_in_the_middle)
    return mesh, before, text


def _text(config: Config, workdir: epath.Path, before: Stage | None) -> PreparedText:
    """The text that is trained on and that is held out. The tokenizer is in the workdir then, as every stage has its own."""
    given = config.tokenizer_from or (before and str(before.tokenizer_path))
    if config.tokens_from:
        given = given or str(epath.Path(config.tokens_from[0]) / TOKENIZER)
        text = read_tokenized(config.tokens_from)
        tokenizer = prepare_tokenizer(workdir, config.data, config.tokenizer, given, config.tokenization)
        if tokenizer.fingerprint != text.tokenizer.fingerprint:
            raise ConfigError(f"{given} is another tokenizer than that of tokens_from; tokenize with it, or leave it out.")
        return text
    tokenizer = prepare_tokenizer(workdir, config.data, config.tokenizer, given, config.tokenization)
    train, held_out = (
        prepare_split(workdir, config.data, split, tokenizer, config.tokenization) for split in ("train", "held_out")
    )
    return PreparedText(tokenizer, [train], [held_out])


def _measure(
    config: Config, text: PreparedText, functions: FunctionalModel, mesh: Mesh
) -> Callable[[Tree, Tree, int | None], dict[str, float]]:
    """(params, buffers, most batches) -> figures of the held-out text; from the second source on they have its name, with its
    number where several have the same."""
    shape = config.loader.seq_len, config.loader.batch_size, mesh
    parts = [HeldOut(shards, text.tokenizer, functions, *shape) for shards in text.held_out]
    plain = [epath.Path(workdir).name for workdir in config.tokens_from[1:]]
    numbered = (name if plain.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(plain, 1))
    names = ["", *(f"_of_{name}" for name in numbered)]

    def measure(params: Tree, buffers: Tree, most_batches: int | None) -> dict[str, float]:
        return {
            figure + name: value
            for name, part in zip(names, parts, strict=True)
            for figure, value in part.measure(params, buffers, most_batches=most_batches).items()
        }

    return measure


def _architecture(config: Config, before: Stage | None) -> ModelConfig:
    if before is None or config.model is None:
        return config.model if before is None else before.config
    wanted, found = to_mapping(config.model), to_mapping(before.config)
    names = [name for name in wanted if name != "tokenizer_vocab_size" and wanted[name] != found[name]]
    if names:
        differences = "; ".join(f"model.{name} is {wanted[name]}, but {found[name]} in init_from" for name in names)
        raise ConfigError(f"{differences}. Set them alike, or give --config.model=None to take the architecture of init_from.")
    return before.config


class _Stopwatch:
    """Seconds of the parts of a run, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """What came since the last lap was `name`."""
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now


def _figures_of_training(config: Config, workdir: epath.Path, model: ModelConfig, sources: list[TokenShards]) -> dict[str, Any]:
    """What was trained on how much, how fast, and where the parameters are; also draws loss.png."""
    metrics = read_metrics(workdir)
    if jax.process_index() == 0:
        _plot_loss(metrics, workdir / "loss.png")
    rates = [record["train/tokens_per_second"] for record in metrics if "train/tokens_per_second" in record]
    groups = parameter_groups(model)
    total = sum(groups.values())
    return {
        "tokens_per_second": statistics.median(rates) if rates else None,
        "steps": config.train.steps,
        "tokens_trained": config.loader.positions(config.train.steps),
        "tokens_in_training_split": sum(shards.tokens for shards in sources),
        "bytes_per_token": sum(shards.text_bytes for shards in sources) / sum(shards.tokens for shards in sources),
        "parameters": total,
        "parameter_audit": [
            {"group": group, "parameters": count, "share": count / total} for group, count in groups.items()
        ],
    }


def _plot_loss(metrics: list[dict[str, float]], path: epath.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("train/nll", "training"), ("eval/nll_per_token", "held-out")):
        points = [(record["step"], record[name]) for record in metrics if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker="o" if name.startswith("eval") else None)
    axes.set(xlabel="step", ylabel="nll per token, nats")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)


def _samples(config: Config, stage: Stage) -> list[dict[str, str]]:
    """A continuation of each prompt."""
    if not config.prompts:
        return []
    tokenizer = stage.tokenizer
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in config.prompts]
    engine = Engine(stage.functions, stage.config, stage.params, stage.buffers, decode=tokenizer.decode)
    requests = [
        Request(
            prompt=tuple(prompt), stop_ids=(tokenizer.eos_id,),
            sampling=dataclasses.replace(config.sampling, seed=(config.sampling.seed + index) % (1 << 32)),
        )
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip
    answers = engine.run(requests)
    return [{"prompt": prompt, "text": answer.text} for prompt, answer in zip(config.prompts, answers, strict=True)]
