"""The batches of a run's troubled steps: their texts, and which row and document has a loss that the others do not have."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipelines import Tokenizer, load_tokenizer
from experiments.inspect_data import colored
from experiments.results import write_results
from experiments.stages import CHECKPOINTS, MODEL, TOKENIZER, checkpoint_functions
from lfm_jax.configuration import ConfigError, from_mapping
from lfm_jax.models import ComputeConfig, ModelConfig
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import CheckpointError, Checkpoints, abstract_state
from lfm_jax.training.trouble import FILE, FOLDER

_BEGINNING = 60  # characters of a text that a table has room for
_ARRAYS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """run: the workdir of a training run. samples: rows of each step that are shown, those with the highest loss first.

    sample_tokens: how much of each. compute: as the run had it, for the loss.
    """

    run: str
    samples: int = 4
    sample_tokens: int = 512
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        if self.samples < 0:
            raise ValueError(f"samples must not be negative, got {self.samples}")


class _Row(NamedTuple):
    """A row of a troubled batch. nll: of each target, [seq]; None where there is no checkpoint to ask. loss: weighted mean."""

    process: int
    index: int
    arrays: dict[str, np.ndarray]
    nll: np.ndarray | None
    loss: float | None


def main(config: Config, workdir: epath.Path) -> None:
    """Prints a table of the troubled steps and the rows that stand out, and writes `samples.html` and the figures."""
    folder = epath.Path(config.run)
    if not (folder / TOKENIZER).exists():
        raise ConfigError(f"run: {folder} is no workdir of a training run: it has no {TOKENIZER}/.")
    lines = _read(folder)
    if not lines:
        print(f"No step of {folder} was troubled: it has no {FILE}.")
    tokenizer, losses = load_tokenizer(folder / TOKENIZER), _Losses(folder, config.compute)
    console, steps = Console(record=True, width=120), []
    for line in lines:
        rows = _rows(folder, line["step"], losses.before(line["step"]))
        steps.append(_figures(line, rows, losses.step, tokenizer))
        for row in rows[: config.samples]:
            _show(console, line["step"], row, tokenizer, config.sample_tokens)
    if steps:
        console.print(_table(steps))
        (workdir / "samples.html").write_text(console.export_html())
    write_results(workdir, {"troubled_steps": len(steps), "steps": steps}, config)


def _read(folder: epath.Path) -> list[dict[str, Any]]:
    """The lines about trouble in the order of the steps; of a step that came again the last, whose batch is there."""
    path = folder / FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}\n")]
    return sorted({record["step"]: record for record in records}.values(), key=lambda record: record["step"])


class _Losses:
    """The loss of each target under the newest good checkpoint from before a step. step: of that checkpoint."""

    def __init__(self, folder: epath.Path, compute: ComputeConfig):
        try:
            config = from_mapping(ModelConfig, json.loads((folder / MODEL).read_text()))
        except (ValueError, OSError) as error:
            raise ConfigError(f"run: {folder / MODEL} cannot be read: {error}") from error
        self._functions, self._checkpoints = checkpoint_functions(folder, config, compute), Checkpoints(folder / CHECKPOINTS)
        self._nll, self.step = jax.jit(self._compute), None

    def before(self, step: int) -> Callable[[dict[str, np.ndarray]], np.ndarray] | None:
        """One row's arrays -> the loss of each target, [seq]; None where the run has no checkpoint from before the step."""
        newest = max((each for each in self._checkpoints.steps() if each < step), default=None)
        if newest is None:
            self.step = None
            return None
        if newest != self.step:
            self._state, self.step = self._restored(newest), newest
        params, buffers = self._state.params, self._state.buffers
        return lambda row: np.asarray(self._nll(params, buffers, *(row[name][None] for name in _ARRAYS[:4])))

    def _restored(self, at_most: int):
        mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        wanted = abstract_state(self._functions, optax.identity(), mesh)
        try:
            return self._checkpoints.restore(wanted, partial=True, at_most=at_most).state
        except CheckpointError as error:
            raise ConfigError(f"run: {error}") from error

    def _compute(self, params, buffers, tokens, targets, segment_ids, positions):
        model = self._functions.bind(self._functions.cast(params), buffers)
        hidden = model(tokens, segment_ids, positions).hidden[0]
        logits = jnp.einsum("se,ve->sv", hidden, model.head, preferred_element_type=jnp.float32)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[0][:, None], axis=-1)[:, 0]


def _rows(folder: epath.Path, step: int, losses: Callable | None) -> list[_Row]:
    """The rows that were kept of a step, those that stand out first: no finite number, then the highest loss."""
    found = []
    for path in (folder / FOLDER / f"step-{step:08d}").glob("process-*.npz"):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            batch = {name: kept[name] for name in _ARRAYS}
        for index in range(len(batch["tokens"])):
            arrays = {name: array[index] for name, array in batch.items()}
            nll = None if losses is None else losses(arrays)
            loss = None if nll is None else _mean(nll, arrays["loss_mask"])
            found.append(_Row(int(path.stem.rpartition("-")[2]), index, arrays, nll, loss))
    return sorted(found, key=lambda row: (-_rank(row.loss), row.process, row.index))


def _mean(nll: np.ndarray, weights: np.ndarray) -> float:
    """Over the targets that count; 0 where none does."""
    total = weights.sum()
    return float((nll * weights)[weights != 0].sum() / total) if total != 0 else 0.0


def _rank(loss: float | None) -> float:
    return 0.0 if loss is None else loss if math.isfinite(loss) else math.inf


def _documents(row: _Row, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Each document of a row: its number there, targets that count, loss, and how it begins."""
    segments, weights = row.arrays["segment_ids"], row.arrays["loss_mask"]
    documents = []
    for segment in np.unique(segments[segments > 0]).tolist():
        here = segments == segment
        loss = None if row.nll is None else _number(_mean(row.nll[here], weights[here]))
        targets, begins = int(np.count_nonzero(weights[here])), _beginning(tokenizer, row.arrays["targets"][here])
        documents.append({"document": segment, "targets": targets, "loss": loss, "begins": begins})
    return documents


def _beginning(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids[:_BEGINNING].tolist())[:_BEGINNING].replace("\n", " ")


def _figures(line: dict[str, Any], rows: list[_Row], checkpoint: int | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is written of a step; numbers that are not finite are strings, as in the run's own file."""
    names = ("step", "batch", "action", "loss", "usual_loss", "gradient_norm", "usual_gradient_norm")
    figures = {name: line.get(name) for name in names} | {"rows": len(rows), "checkpoint": checkpoint}
    if rows and checkpoint is not None:
        median = float(np.median([_rank(row.loss) for row in rows]))
        figures |= {"median_row_loss": _number(median), "worst_row_loss": _number(rows[0].loss)}
    if rows:
        documents = _documents(rows[0], tokenizer)
        worst = max(documents, key=lambda each: _rank(each["loss"] and float(each["loss"])), default=None)
        figures |= {"worst_row": f"{rows[0].process}:{rows[0].index}", "documents": documents}
        figures["begins"] = "" if worst is None else worst["begins"]
    return figures


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _show(console: Console, step: int, row: _Row, tokenizer: Tokenizer, most: int) -> None:
    known = "" if row.loss is None else f", loss {row.loss:.4g}"
    console.print(Text(f"step {step}, process {row.process}, row {row.index}{known}", "bold"))
    table = Table("document", "targets", "loss", "begins")
    for each in _documents(row, tokenizer):
        table.add_row(*(Text(_text(each[name])) for name in ("document", "targets", "loss", "begins")))
    console.print(table)
    console.print(colored(row.arrays, tokenizer, most), soft_wrap=True)
    console.rule()


def _table(steps: list[dict[str, Any]]) -> Table:
    names = ("step", "action", "loss", "usual_loss", "rows", "worst_row", "worst_row_loss", "median_row_loss", "begins")
    table = Table(*(name.replace("_", " ") for name in names))
    for figures in steps:
        table.add_row(*(Text(_text(figures.get(name))) for name in names))
    return table


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
