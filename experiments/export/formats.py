"""One function for each format: it writes the files, runs them where they are for, and says how they compare."""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Column, Table

from data_pipelines import Tokenizer
from data_pipelines.conversations import end_ids
from experiments.llama_cpp import llama_cpp_installed, run_llama_cpp
from experiments.stages import Stage, model_functions
from lfm_jax.generation import Engine, Request, SamplingConfig
from lfm_jax.interop import GenerationSettings
from lfm_jax.interop.exported_file import MOST_RELATIVE_DIFFERENCE, measure_speed, reference_logits
from lfm_jax.models import ComputeConfig

if TYPE_CHECKING:
    from experiments.export import ExportConfig

GGUF = "gguf"
PROMPT = "The first line of the file says"
_TEXTS = (PROMPT, "naïve café, 12,345.67 €\r\n\tdef f(x): return x**2  # 你好 🙂", " <|im_end|> two  spaces\n\n")
_TIMED_PROMPT, _TIMED_NEW = 128, 32
_IMPORTANCE_ROW, _IMPORTANCE_ROWS = 512, 128


class Row(NamedTuple):
    """One file.

    file: its path in the workdir. runtime: what ran it; None: nothing did.
    max_difference: the largest from ours over all that was compared, of logits, or of log-probabilities in GGUF's case.
    greedy_agreement: share of positions with the same most likely token; in GGUF's case of a continuation, up to the first token
      that is another.
    tokens_per_second: decoded by the runtime on this machine, one sequence. first_token_seconds, peak_bytes: of the PyTorch,
      ExecuTorch and ONNX programs, see `measure_speed`; the prompt has 128 tokens.
    """

    file: str
    bytes: int
    runtime: str | None = None
    max_difference: float | None = None
    greedy_agreement: float | None = None
    tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    peak_bytes: int | None = None


class Material:
    """What the exporters work on; what several of them need is made once.

    hf: the Hugging Face folder of the model.
    """

    def __init__(self, config: "ExportConfig", stage: Stage, folder: epath.Path, hf: epath.Path):
        self.config, self.stage, self.folder, self.hf = config, stage, folder, hf
        self.capacity = min(config.capacity, stage.config.context_length)

    @functools.cached_property
    def rounded(self) -> Any:
        """The parameters as the folder has them, in float32."""
        return jax.tree.map(lambda leaf: leaf.astype(self.config.dtype).astype(jnp.float32), self.stage.params)

    @functools.cached_property
    def prompt(self) -> list[int]:
        """What the text to compare on begins with."""
        return [self.stage.tokenizer.bos_id, *self.stage.tokenizer.encode(PROMPT)]

    @functools.cached_property
    def reference(self) -> Any:
        """The prompt with our greedy continuation, and our logits over both, of the parameters as the folder has them."""
        return self._reference(self.rounded)

    @functools.cached_property
    def unrounded_reference(self) -> Any:
        """The same of the parameters themselves, which GGUF files are made of."""
        return self.reference if self.config.dtype == "float32" else self._reference(self.stage.params)

    def _reference(self, params: Any) -> Any:
        new = continued(self.stage, params, self.prompt, max(8, self.config.check_tokens))
        with jax.default_matmul_precision("highest"):
            return reference_logits(self.stage.config, params, self.stage.buffers, self.prompt + new)

    @functools.cached_property
    def torch_model(self) -> Any:
        """The folder as a PyTorch module."""
        from lfm_jax.interop.torch_model import load_torch_model

        return load_torch_model(self.hf)

    def row(self, runtime: str, found: Any, opened: Callable | None) -> Row:
        """Of what an exporter returned. opened: how its runtime is timed; None: it is not."""
        relative = epath.Path(found.file).relative_to(self.folder.parent)
        row = Row(str(relative), found.bytes, runtime, found.max_logit_difference, found.greedy_agreement)
        if opened is not None and self.capacity >= _TIMED_PROMPT + _TIMED_NEW:
            measured = measure_speed(opened, found.file, prompt_tokens=_TIMED_PROMPT, new_tokens=_TIMED_NEW)
            row = row._replace(**measured._asdict())
        return row


def settings_for(tokenizer: Tokenizer) -> GenerationSettings:
    """The special ids of a tokenizer; a generation ends where an assistant's turn does."""
    return GenerationSettings(bos_id=tokenizer.bos_id, eos_ids=end_ids(tokenizer), pad_id=tokenizer.pad_id)


def continued(stage: Stage, params: Any, prompt: Sequence[int], count: int, stop_ids: Sequence[int] = ()) -> list[int]:
    """Our greedy continuation in float32."""
    functions = model_functions(stage.config, ComputeConfig(dtype="float32"))
    greedy = SamplingConfig(temperature=0, max_new_tokens=count)
    request = Request(prompt=tuple(prompt), sampling=greedy, stop_ids=tuple(stop_ids))
    with jax.default_matmul_precision("highest"):
        (answer,) = Engine(functions, stage.config, params, stage.buffers).run([request])
    return answer.tokens


def _gguf(material: Material) -> list[Row]:
    """Each type from the parameters themselves, K-quants from a file in float32 that this run wrote.

    A file has its name once llama.cpp has run it, where that is installed; one in float32 that was not asked for is removed.
    """
    folder = material.folder / GGUF
    unchecked = folder / ".unchecked"
    if unchecked.exists():  # of an export that was killed
        unchecked.rmtree()
    unchecked.mkdir(parents=True)
    try:
        return _gguf_files(material, folder, unchecked)
    finally:
        unchecked.rmtree()


def _gguf_files(material: Material, folder: epath.Path, unchecked: epath.Path) -> list[Row]:
    from lfm_jax.interop.gguf_file import TYPES, export_gguf
    from lfm_jax.interop.gguf_quantize import measure_importance, quantize_gguf

    stage, rows, importance = material.stage, [], None
    written: dict[str, epath.Path] = {}

    def write(kind: str) -> epath.Path:
        if kind not in written:
            written[kind] = export_gguf(
                stage.config, stage.params, stage.buffers, unchecked / f"model-{kind}.gguf",
                tokenizer=stage.tokenizer_path, type=kind, generation=settings_for(stage.tokenizer),
            )  # fmt: skip
        return written[kind]

    for kind in dict.fromkeys(material.config.gguf_types):
        if kind in TYPES:
            file = write(kind)
        else:
            source = write("F32")
            if importance is None and material.config.gguf_importance is not None:
                importance = measure_importance(source, _importance_rows(material))
            file = quantize_gguf(source, unchecked / f"model-{kind}.gguf", kind, importance=importance)
        place = folder / file.name
        row = Row(str(place.relative_to(material.folder.parent)), file.stat().length)
        if llama_cpp_installed() and material.config.check_tokens:
            row = row._replace(runtime="llama.cpp", **_run_gguf(material, file, place, exact=kind == "F32"))
        rows.append(row)
        written[kind] = file.replace(place)
    return rows


def _importance_rows(material: Material) -> list[list[int]]:
    """The beginning of the text that importance is measured over, in rows that begin as a text does."""
    tokenizer, size = material.stage.tokenizer, min(_IMPORTANCE_ROW, material.stage.config.context_length) - 1
    ids = tokenizer.encode(epath.Path(material.config.gguf_importance).read_text())[: _IMPORTANCE_ROWS * size]
    if not ids:
        raise ValueError(f"gguf_importance: {material.config.gguf_importance} is empty; give a text like those the model is for")
    return [[tokenizer.bos_id, *ids[first : first + size]] for first in range(0, len(ids), size)]


def _run_gguf(material: Material, file: epath.Path, place: epath.Path, *, exact: bool) -> dict[str, float | None]:
    """Those figures of the file's row that llama.cpp tells.

    Args:
      place: what errors call the file. exact: whether it must compute what we do, as one in float32.
    """
    tokenizer, reference, prompt = material.stage.tokenizer, material.unrounded_reference, material.prompt
    text = reference.tokens.tolist()
    new = text[len(prompt) :]
    answers = run_llama_cpp(file, texts=_TEXTS, scored=[text], prompts=[prompt], new_tokens=len(new))
    expected = [list(tokenizer.encode(part)) for part in _TEXTS]
    if answers.ids != expected:
        wrong = next(part for part, ours, theirs in zip(_TEXTS, expected, answers.ids, strict=True) if ours != theirs)
        raise ValueError(f"{place}: llama.cpp makes other ids of {wrong!r} than the tokenizer that the model was trained with")
    # Rows of the vocabulary without a token are not in the file, and have no probability there.
    known = reference.logits[:, : tokenizer.vocab_size]
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(known), axis=-1))
    ours = log_probs[np.arange(len(text) - 1), text[1:]]
    difference = float(np.abs(ours - np.asarray(answers.log_probs[0])).max())
    tolerance = tolerated(known)
    (theirs,) = answers.continuations
    if theirs and theirs[-1] in settings_for(tokenizer).eos_ids:
        new = new[: len(theirs)]
    same = agreeing(new, theirs)
    other = exact and other_choice(log_probs[len(prompt) - 1 :], new, theirs, tolerance)
    if other or not difference < (tolerance if exact else np.inf):
        raise ValueError(
            f"{place} is not written: log-probabilities in llama.cpp differ by {difference:.3g} ({tolerance:.3g} is expected at "
            f"most), and {same} of {len(new)} tokens of a greedy continuation are ours"
        )
    return {
        "max_difference": difference, "greedy_agreement": same / len(new),
        "tokens_per_second": answers.decode_tokens_per_second,
    }  # fmt: skip


def tolerated(logits: np.ndarray) -> float:
    """What a logit or a log-probability may differ by in another float32 program; logits: ours."""
    return MOST_RELATIVE_DIFFERENCE * max(1.0, float(np.abs(logits).max()))


def agreeing(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """The number of tokens before the first that is another, or is there in one of the two alone."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return sum(1 for _ in pairs)


def other_choice(logits: np.ndarray, ours: Sequence[int], theirs: Sequence[int], tolerance: float) -> bool:
    """Whether two greedy continuations differ, and not by a tie.

    Args:
      logits: [seq, vocab], ours; the first row is that which the first of our tokens was chosen by.
      tolerance: what a logit may differ by; where one of the two tokens has one that is lower than the largest by twice as much,
        it is no tie.
    """
    same = agreeing(ours, theirs)
    if same == len(ours) == len(theirs):
        return False
    if same == min(len(ours), len(theirs)):
        return True
    return bool(logits[same].max() - logits[same, [ours[same], theirs[same]]].min() > 2 * tolerance)


def _pytorch(material: Material) -> list[Row]:
    from lfm_jax.interop.torch_export import export_pt2, open_pt2

    file = material.folder / "model.pt2"
    found = export_pt2(material.torch_model, file, material.reference, capacity=material.capacity)
    return [material.row("PyTorch", found, open_pt2)]


def _onnx(material: Material) -> list[Row]:
    from lfm_jax.interop.torch_export import export_onnx, open_onnx

    file = material.folder / "model.onnx"
    found = export_onnx(material.torch_model, file, material.reference, capacity=material.capacity)
    return [material.row("onnxruntime", found, open_onnx)]


def _executorch(material: Material) -> list[Row]:
    from lfm_jax.interop.executorch_file import export_executorch, open_executorch, special_ids

    rows = []
    for kind in material.config.executorch_types:
        file = material.folder / ("model.pte" if kind == "none" else f"model-{kind}.pte")
        found = export_executorch(
            material.torch_model, file, material.reference, ids=special_ids(material.hf), quantization=kind,
            capacity=material.capacity, chunk=min(128, material.capacity),
        )  # fmt: skip
        rows.append(material.row("ExecuTorch", found, open_executorch))
    return rows


def _stablehlo(material: Material) -> list[Row]:
    from lfm_jax.interop.stablehlo import export_stablehlo

    file, stage = material.folder / "model.stablehlo", material.stage
    found = export_stablehlo(stage.config, material.rounded, stage.buffers, file, material.reference)
    return [material.row("jax.export", found, None)]


EXPORTERS: dict[str, Callable[[Material], list[Row]]] = {
    "gguf": _gguf, "pytorch": _pytorch, "executorch": _executorch, "onnx": _onnx, "stablehlo": _stablehlo
}


def print_table(rows: Sequence[Row]) -> None:
    """To the terminal."""
    # In 80 columns only the names of files are folded.
    figures = ("MB", "runtime", "largest\ndifference", "greedy", "tokens/s", "first\ntoken, ms", "peak MB")
    columns = (Column(name, no_wrap=True, justify="left" if name == "runtime" else "right") for name in figures)
    table = Table(Column("file", overflow="fold"), *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = lambda value, form: "" if value is None else format(value, form)
    for row in rows:
        table.add_row(
            row.file, f"{row.bytes / 1e6:.2f}", row.runtime or "", shown(row.max_difference, ".1e"),
            shown(row.greedy_agreement, ".0%"), shown(row.tokens_per_second, ",.0f"),
            shown(row.first_token_seconds and 1000 * row.first_token_seconds, ".1f"),
            shown(row.peak_bytes and row.peak_bytes / 1e6, ",.0f"),
        )  # fmt: skip
    Console().print(table)


def installed(*packages: str) -> bool:
    """Whether all of them are."""
    return all(importlib.util.find_spec(package) is not None for package in packages)
