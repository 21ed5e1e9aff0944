"""How many tokens one optimizer needs for the loss that another reaches, each at the best of its own learning rates."""

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from data_pipelines import DocumentsConfig, LoaderConfig, TokenizerConfig
from experiments.benchmarks.processes import run_module
from experiments.prepared_data import prepare_split, prepare_tokenizer
from experiments.results import write_json, write_results
from lfm_jax.configuration import from_mapping, to_mapping
from lfm_jax.models import ComputeConfig, ModelConfig
from lfm_jax.training import OptimizerConfig, TrainConfig, read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of the comparison.

    optimizer: its learning rate is replaced by each of `rates`. shorter: shares of the steps that the best rate is also trained
    for, with a schedule of that length.
    """

    name: str
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    rates: tuple[float, ...]
    shorter: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.rates:
            raise ValueError(f"arm {self.name!r} has no learning rate; give at least one in rates")
        if any(not 0 < share < 1 for share in self.shorter):
            raise ValueError(f"shorter of arm {self.name!r} must be shares of the steps between 0 and 1, got {self.shorter}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared on which model and text.

    arms: the first is what the others are held against. Every rate is trained with the first seed, the best of each arm with all.
    seeds: that many, each of initial parameters and of the order of the text. processes: runs at a time, on one core each.
    evaluation_batches: of held-out text, for each figure.
    """

    arms: tuple[Arm, ...]
    model: ModelConfig
    data: DocumentsConfig
    tokenizer: TokenizerConfig
    loader: LoaderConfig
    train: TrainConfig
    seeds: int = 3
    evaluation_batches: int = 64
    processes: int = 2

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"arms must be at least two of different names, got {names}")
        if min(self.seeds, self.processes) < 1:
            raise ValueError(f"seeds and processes must be at least 1, got {self.seeds} and {self.processes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, in a process of its own. arm: its name. data_folder: where tokenizer and tokens are."""

    arm: str
    optimizer: OptimizerConfig
    compute: ComputeConfig
    model: ModelConfig
    data: DocumentsConfig
    tokenizer: TokenizerConfig
    loader: LoaderConfig
    train: TrainConfig
    evaluation_batches: int
    data_folder: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}_rate{self.optimizer.learning_rate:g}_steps{self.train.steps}_seed{self.train.seed}"


def _run(config: Config, workdir: epath.Path, arm: Arm, rate: float, share: float, seed: int) -> Run:
    steps = round(share * config.train.steps)
    return Run(
        arm=arm.name, optimizer=dataclasses.replace(arm.optimizer, learning_rate=rate), compute=arm.compute,
        model=config.model, data=config.data, tokenizer=config.tokenizer,
        loader=dataclasses.replace(config.loader, seed=config.loader.seed + seed),
        train=dataclasses.replace(config.train, steps=steps, seed=config.train.seed + seed),
        evaluation_batches=config.evaluation_batches, data_folder=str(workdir),
    )  # fmt: skip


def _train(run: Run) -> dict[str, Any]:
    from data_pipelines import training_batches
    from experiments.held_out import HeldOut
    from experiments.stages import fit_vocabulary, model_functions
    from lfm_jax.sharding import MeshConfig, make_mesh
    from lfm_jax.training import LossConfig, TrainingDiverged, make_optimizer, next_token_objective, train

    folder = epath.Path(run.data_folder)
    tokenizer = prepare_tokenizer(folder, run.data, run.tokenizer, None)
    shards = {split: prepare_split(folder, run.data, split, tokenizer) for split in ("train", "held_out")}
    functions, mesh = model_functions(fit_vocabulary(run.model, tokenizer), run.compute), make_mesh(MeshConfig())
    held_out = HeldOut(shards["held_out"], tokenizer, functions, run.loader.seq_len, run.loader.batch_size, mesh)
    measure = lambda params, buffers: held_out.measure(params, buffers, most_batches=run.evaluation_batches)
    workdir = folder / "runs" / run.name
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        train(
            run.train, functions=functions, optimizer=make_optimizer(run.optimizer, run.train.steps),
            objective=next_token_objective(LossConfig()), batches=training_batches([shards["train"]], run.loader, tokenizer),
            mesh=mesh, workdir=workdir, run_config=to_mapping(run), evaluate=measure,
        )  # fmt: skip
    except TrainingDiverged:
        return {"nll_per_token": None, "curve": []}
    tokens = run.loader.batch_size * run.loader.seq_len
    records = [record for record in read_metrics(workdir) if "eval/nll_per_token" in record]
    curve = [(record["step"] * tokens, record["eval/nll_per_token"]) for record in records]
    return {"nll_per_token": curve[-1][1], "curve": curve}


def _results(config: Config, workdir: epath.Path, runs: list[Run], progress) -> list[dict[str, Any]]:
    """What became of each run; those that a run of this benchmark before has finished are not trained again."""

    def result(run: Run) -> dict[str, Any]:
        record = workdir / "runs" / f"{run.name}.json"
        if not record.exists() or json.loads(record.read_text())["run"] != to_mapping(run):
            one_core = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}
            write_json(record, {**run_module(__name__, to_mapping(run), environment=one_core), "run": to_mapping(run)})
        progress.advance(progress.task_ids[0])
        return json.loads(record.read_text())

    with ThreadPoolExecutor(config.processes) as pool:
        return list(pool.map(result, runs))


def _loss(result: dict[str, Any]) -> float:
    return float("inf") if result["nll_per_token"] is None else result["nll_per_token"]


def tokens_to(loss: float, tokens: list[float], losses: list[float]) -> float | None:
    """Tokens at which the losses of runs of several lengths come down to `loss`, between two of them on a straight line in log
    tokens; None where none of them does, or the shortest already has."""
    ended = sorted(pair for pair in zip(tokens, losses, strict=True) if np.isfinite(pair[1]))
    if not ended:
        return None
    logs, losses = np.log([pair[0] for pair in ended]), np.array([pair[1] for pair in ended])
    below = np.flatnonzero(losses <= loss)
    if not len(below) or below[0] == 0:
        return None
    after = below[0]
    share = (losses[after - 1] - loss) / (losses[after - 1] - losses[after])
    return float(np.exp(logs[after - 1] + share * (logs[after] - logs[after - 1])))


def main(config: Config, workdir: epath.Path) -> None:
    """Trains the grids, then the best of each arm with all seeds and lengths; writes results.json, optimizers.md and a plot."""
    from rich.progress import Progress

    tokenizer = prepare_tokenizer(workdir, config.data, config.tokenizer, None)
    for split in ("train", "held_out"):
        prepare_split(workdir, config.data, split, tokenizer)
    (workdir / "runs").mkdir(exist_ok=True)
    grid = [_run(config, workdir, arm, rate, 1.0, 0) for arm in config.arms for rate in arm.rates]
    later = sum(config.seeds * (1 + len(arm.shorter)) - 1 for arm in config.arms)
    with Progress() as progress:
        progress.add_task("training", total=len(grid) + later)
        found = dict(zip([run.name for run in grid], _results(config, workdir, grid, progress), strict=True))
        rates = {}
        for arm in config.arms:
            rates[arm.name] = min(arm.rates, key=lambda rate: _loss(found[_run(config, workdir, arm, rate, 1.0, 0).name]))
        more = [
            _run(config, workdir, arm, rates[arm.name], share, seed)
            for seed in range(config.seeds) for arm in config.arms for share in (1.0, *arm.shorter)
            if seed or share < 1
        ]  # fmt: skip
        found |= dict(zip([run.name for run in more], _results(config, workdir, more, progress), strict=True))
    figures = _figures(config, workdir, found, rates)
    (workdir / "optimizers.md").write_text(_markdown(figures))
    _plot(figures, workdir / "optimizers.png")
    write_results(workdir, figures, config)


def _figures(config: Config, workdir: epath.Path, found: dict[str, dict], rates: dict[str, float]) -> dict[str, Any]:
    tokens_of = lambda share: round(share * config.train.steps) * config.loader.batch_size * config.loader.seq_len
    rows, baseline = [], None
    for arm in config.arms:
        rate = rates[arm.name]
        of = lambda share, seed, arm=arm, rate=rate: found[_run(config, workdir, arm, rate, share, seed).name]
        grid = [
            {"learning_rate": each, "nll_per_token": found[_run(config, workdir, arm, each, 1.0, 0).name]["nll_per_token"]}
            for each in arm.rates
        ]
        lengths = sorted((*arm.shorter, 1.0))
        by_seed = [[_loss(of(share, seed)) for share in lengths] for seed in range(config.seeds)]
        ends = [losses[-1] for losses in by_seed]
        baseline = ends if baseline is None else baseline
        tokens = [tokens_of(share) for share in lengths]
        needed = [tokens_to(base, tokens, losses) for base, losses in zip(baseline, by_seed, strict=True)]
        row = {
            "arm": arm.name, "grid": grid, "learning_rate": rate,
            "best_is_inside_the_grid": len(arm.rates) == 1 or min(arm.rates) < rate < max(arm.rates),
            "nll_per_token": float(np.mean(ends)), "nll_per_token_by_seed": ends,
            "above_first_arm_by_seed": [float(end - base) for end, base in zip(ends, baseline, strict=True)],
            "lengths": [{"tokens": count, "nll_per_token": float(np.mean(losses))}
                        for count, losses in zip(tokens, zip(*by_seed, strict=True), strict=True)],
            "curve": of(1.0, 0)["curve"],
        }  # fmt: skip
        row["tokens_to_first_arm_by_seed"] = needed if arm.shorter else []
        known = [tokens[-1] / count for count in needed if count is not None]
        row["tokens_saved_factor"] = float(np.mean(known)) if arm.shorter and len(known) == config.seeds else None
        rows.append(row)
    return {"arms": rows, "tokens": tokens_of(1.0)} | {f"{row['arm']}_nll_per_token": row["nll_per_token"] for row in rows}


def _markdown(figures: dict[str, Any]) -> str:
    """The tables, for documentation."""
    show = lambda loss: "diverged" if loss is None else f"{loss:.4f}"
    lines = ["| arm | learning rate: held-out nll per token (first seed) |", "|---|---|"]
    for row in figures["arms"]:
        grid = ", ".join(f"{each['learning_rate']:g}: {show(each['nll_per_token'])}" for each in row["grid"])
        lines.append(f"| {row['arm']} | {grid} |")
    lines += [
        "",
        "| arm | rate | tokens: nll per token, mean of seeds | above the first arm, by seed | tokens of the first arm / own |",
        "|---|---|---|---|---|",
    ]
    for row in figures["arms"]:
        lengths = ", ".join(f"{each['tokens']:,}: {each['nll_per_token']:.4f}" for each in row["lengths"])
        above = ", ".join(f"{each:+.4f}" for each in row["above_first_arm_by_seed"])
        factor = "" if row["tokens_saved_factor"] is None else f"{row['tokens_saved_factor']:.2f}"
        lines.append(f"| {row['arm']} | {row['learning_rate']:g} | {lengths} | {above} | {factor} |")
    return "\n".join(lines) + "\n"


def _plot(figures: dict[str, Any], path: epath.Path) -> None:
    """Left: the end of each rate's run. Right: the best rate's run on the way, and the ends of runs of several lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, row in enumerate(figures["arms"]):
        color = f"C{number}"
        known = [each for each in row["grid"] if each["nll_per_token"] is not None]
        left.plot([each["learning_rate"] for each in known], [each["nll_per_token"] for each in known], "o-", color=color)
        right.plot(*zip(*row["curve"], strict=True), color=color, linewidth=1, label=row["arm"])
        ends = [(each["tokens"], each["nll_per_token"]) for each in row["lengths"]]
        right.plot(*zip(*ends, strict=True), "s", color=color)
    left.set(xscale="log", xlabel="peak learning rate", ylabel="held-out nll per token, nats")
    least = min(row["nll_per_token"] for row in figures["arms"])
    right.set(xlabel="tokens", ylabel="held-out nll per token, nats", ylim=(least - 0.05, least + 1.2))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    print(json.dumps(_train(from_mapping(Run, json.load(sys.stdin)))))
