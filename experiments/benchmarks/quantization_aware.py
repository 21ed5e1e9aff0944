"""Bits per byte of a model in floating point and rounded to a file's few bits, trained on with and without knowing of them."""

import dataclasses
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from data_pipelines import DocumentsConfig, LoaderConfig, TokenizerConfig, training_batches
from experiments.export.formats import settings_for
from experiments.held_out import HeldOut
from experiments.llama_cpp import llama_cpp_installed, run_llama_cpp
from experiments.prepared_data import prepare_rows, prepare_split, prepare_tokenizer
from experiments.results import write_results
from experiments.stages import load_stage, mesh_for, model_functions
from lfm_jax.configuration import to_mapping
from lfm_jax.interop.gguf_file import export_gguf
from lfm_jax.models import ComputeConfig
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import LossConfig, OptimizerConfig, TrainConfig, make_optimizer, next_token_objective, train

FORMATS = ("none", "q4_0", "8da4w")
_NAMES = {"none": "floating point", "q4_0": "Q4_0", "8da4w": "8da4w"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: the workdir of a run, or a Hugging Face folder, whose model is trained on, with each format and each seed.

    data: read by the model's own tokenizer. seeds: that many, of the order of the text.
    scored_tokens: of held-out text, for llama.cpp; 0: it is not asked.
    """

    init_from: str
    data: DocumentsConfig
    loader: LoaderConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    seeds: int = 3
    scored_tokens: int = 16384

    def __post_init__(self):
        if self.seeds < 1 or self.scored_tokens < 0:
            raise ValueError(f"seeds must be positive and scored_tokens not negative, got {self.seeds} and {self.scored_tokens}")
        if self.compute.file_format != "none":
            raise ValueError(f"compute.file_format is what is compared here; leave it out, not {self.compute.file_format!r}")


def main(config: Config, workdir: epath.Path) -> None:
    """Trains, measures, and writes results.json and quantization_aware.md."""
    comparison = _Comparison(config, workdir)
    stage = comparison.stage
    rows = [{"trained": None, "bits_per_byte": [comparison.measure(stage.params, stage.buffers)]}]
    files = [*comparison.in_llama_cpp("F32", None, stage.params), *comparison.in_llama_cpp("Q4_0", None, stage.params)]
    for name in FORMATS:
        states = [comparison.trained(name, seed) for seed in range(config.seeds)]
        rows.append({"trained": name, "bits_per_byte": [comparison.measure(*state) for state in states]})
        if name != "8da4w":
            files += comparison.in_llama_cpp("Q4_0", name, states[0][0])
    (workdir / "quantization_aware.md").write_text(_markdown(rows, files))
    write_results(workdir, {**_costs(rows), "rows": rows, "llama_cpp": files}, config)


class _Comparison:
    """One model, and text to train it on and to measure it by."""

    def __init__(self, config: Config, workdir: epath.Path):
        self._config, self._workdir = config, workdir
        self._mesh = mesh_for(config.mesh, config.loader.batch_size, config.train.accumulation)
        self.stage = load_stage(config.init_from, config.compute, self._mesh)
        self._tokenizer = prepare_tokenizer(workdir, config.data, TokenizerConfig(), str(self.stage.tokenizer_path))
        self._text = {split: prepare_split(workdir, config.data, split, self._tokenizer) for split in ("train", "held_out")}
        prepare_rows(self._text["train"], config.loader.seq_len)
        compute = {name: dataclasses.replace(config.compute, file_format=name) for name in FORMATS}
        self._functions = {name: model_functions(self.stage.config, compute[name]) for name in FORMATS}
        shape = config.loader.seq_len, config.loader.batch_size, self._mesh
        held_out = self._text["held_out"]
        self._held_out = {name: HeldOut(held_out, self._tokenizer, self._functions[name], *shape) for name in FORMATS}

    def measure(self, params: Tree, buffers: Tree) -> dict[str, float]:
        """Bits per byte of the held-out text, rounded to each format."""
        return {name: each.measure(params, buffers)["bits_per_byte"] for name, each in self._held_out.items()}

    def trained(self, file_format: str, seed: int) -> tuple[Tree, Tree]:
        """Parameters and buffers after training on."""
        config, folder = self._config, self._workdir / "runs" / f"{file_format}_seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        loader = dataclasses.replace(config.loader, seed=config.loader.seed + seed)
        state = train(
            config.train, functions=self._functions[file_format], optimizer=make_optimizer(config.optimizer, config.train.steps),
            objective=next_token_objective(LossConfig()),
            batches=training_batches([self._text["train"]], loader, self._tokenizer), mesh=self._mesh, workdir=folder,
            run_config=to_mapping(config), initial=jax.tree.map(jnp.copy, (self.stage.params, self.stage.buffers)),
        ).state  # fmt: skip
        return state.params, state.buffers

    def in_llama_cpp(self, kind: str, trained: str | None, params: Tree) -> list[dict[str, Any]]:
        """What llama.cpp makes of a file of these parameters; nothing where it is not installed."""
        rows = self._pieces()
        if not rows or not llama_cpp_installed():
            return []
        file = export_gguf(
            self.stage.config, params, self.stage.buffers, self._workdir / f"{kind}_{trained}.gguf",
            tokenizer=self.stage.tokenizer_path, type=kind, generation=settings_for(self._tokenizer),
        )  # fmt: skip
        return [{"trained": trained, "file": kind, "nll_per_token": math.log(run_llama_cpp(file, scored=rows).perplexity)}]

    def _pieces(self) -> list[list[int]]:
        """The first of each of the first documents that are held out, together as many tokens as are scored."""
        shards, pieces, left = self._text["held_out"], [], self._config.scored_tokens
        for document in range(len(shards)):
            piece = [self._tokenizer.bos_id, *shards[document].tolist()][: min(left, self._config.loader.seq_len)]
            if len(piece) > 1:
                pieces.append(piece)
                left -= len(piece)
        return pieces


def _mean(row: dict[str, Any], name: str) -> float:
    return statistics.mean(figures[name] for figures in row["bits_per_byte"])


def _costs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Bits per byte that each format costs, after training on in floating point and knowing of it."""
    of = {row["trained"]: row for row in rows}
    costs = {}
    for name in FORMATS[1:]:
        exact = _mean(of["none"], "none")
        costs[f"{name}_costs_bits_per_byte"] = _mean(of["none"], name) - exact
        costs[f"{name}_costs_bits_per_byte_trained"] = _mean(of[name], name) - exact
    return costs


def _markdown(rows: list[dict[str, Any]], files: list[dict[str, Any]]) -> str:
    """The tables, for documentation."""
    trained = lambda row: "as it was" if row["trained"] is None else _NAMES[row["trained"]]
    lines = [f"| trained on in | {' | '.join(_NAMES[name] for name in FORMATS)} |", "|---|" + "---|" * len(FORMATS)]
    for row in rows:
        cells = []
        for name in FORMATS:
            seeds = [figures[name] for figures in row["bits_per_byte"]]
            spread = f" ({min(seeds):.4f} to {max(seeds):.4f})" if len(seeds) > 1 else ""
            cells.append(f"{_mean(row, name):.4f}{spread}")
        lines.append(f"| {trained(row)} | {' | '.join(cells)} |")
    if files:
        lines += ["", "| trained on in | file | nll per token in llama.cpp |", "|---|---|---|"]
        lines += [f"| {trained(file)} | {file['file']} | {file['nll_per_token']:.4f} |" for file in files]
    return "\n".join(lines) + "\n"
