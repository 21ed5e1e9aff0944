"""One function for each format: it writes the files, runs them where they are for, and says how they compare."""

import functools
import importlib.util
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
from experiments.llama_cpp import llama_cpp_installed, run_llama_cpp
from experiments.stages import Stage, model_functions
from lfm_jax.generation import Engine, Request, SamplingConfig
from lfm_jax.interop import GenerationSettings
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
    def text(self) -> tuple[list[int], list[int]]:
        """A prompt, and our greedy continuation of it."""
        prompt = [self.stage.tokenizer.bos_id, *self.stage.tokenizer.encode(PROMPT)]
        return prompt, continued(self.stage, self.rounded, prompt, max(8, self.config.check_tokens))

    @functools.cached_property
    def reference(self) -> Any:
        """Our logits over the text."""
        from lfm_jax.interop.exported_file import reference_logits

        prompt, new = self.text
        with jax.default_matmul_precision("highest"):
            return reference_logits(self.stage.config, self.rounded, self.stage.buffers, prompt + new)

    @functools.cached_property
    def torch_model(self) -> Any:
        """The folder as a PyTorch module."""
        from lfm_jax.interop.torch_model import load_torch_model

        return load_torch_model(self.hf)

    def row(self, runtime: str, found: Any, opened: Callable | None) -> Row:
        """Of what an exporter returned. opened: how its runtime is timed; None: it is not."""
        from lfm_jax.interop.exported_file import measure_speed

        relative = epath.Path(found.file).relative_to(self.folder.parent)
        row = Row(str(relative), found.bytes, runtime, found.max_logit_difference, found.greedy_agreement)
        if opened is not None and self.capacity >= _TIMED_PROMPT + _TIMED_NEW:
            measured = measure_speed(opened, found.file, prompt_tokens=_TIMED_PROMPT, new_tokens=_TIMED_NEW)
            row = row._replace(**measured._asdict())
        return row


def settings_for(tokenizer: Tokenizer) -> GenerationSettings:
    """The special ids of a tokenizer."""
    return GenerationSettings(bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id)


def continued(stage: Stage, params: Any, prompt: Sequence[int], count: int, stop_ids: Sequence[int] = ()) -> list[int]:
    """Our greedy continuation in float32."""
    functions = model_functions(stage.config, ComputeConfig(dtype="float32"))
    greedy = SamplingConfig(temperature=0, max_new_tokens=count)
    request = Request(prompt=tuple(prompt), sampling=greedy, stop_ids=tuple(stop_ids))
    with jax.default_matmul_precision("highest"):
        (answer,) = Engine(functions, stage.config, params, stage.buffers).run([request])
    return answer.tokens


def _gguf(material: Material) -> list[Row]:
    """Each type from the parameters themselves, K-quants from the file in float32."""
    from lfm_jax.interop.gguf_file import TYPES, export_gguf
    from lfm_jax.interop.gguf_quantize import measure_importance, quantize_gguf

    stage, folder, rows, importance = material.stage, material.folder / GGUF, [], None
    folder.mkdir(parents=True, exist_ok=True)
    write = lambda kind: export_gguf(
        stage.config, stage.params, stage.buffers, folder / f"model-{kind}.gguf",
        tokenizer=stage.tokenizer_path, type=kind, generation=settings_for(stage.tokenizer),
    )  # fmt: skip
    for kind in material.config.gguf_types:
        if kind in TYPES:
            file = write(kind)
        else:
            source = folder / "model-F32.gguf"
            source = source if source.exists() else write("F32")
            if importance is None and material.config.gguf_importance is not None:
                importance = measure_importance(source, _importance_rows(material))
            file = quantize_gguf(source, folder / f"model-{kind}.gguf", kind, importance=importance)
        rows.append(_run_gguf(material, file))
    return rows


def _importance_rows(material: Material) -> list[list[int]]:
    """The beginning of the text that importance is measured over, in rows that begin as a text does."""
    tokenizer, size = material.stage.tokenizer, min(_IMPORTANCE_ROW, material.stage.config.context_length) - 1
    ids = tokenizer.encode(epath.Path(material.config.gguf_importance).read_text())[: _IMPORTANCE_ROWS * size]
    if not ids:
        raise ValueError(f"gguf_importance: {material.config.gguf_importance} is empty; give a text like those the model is for")
    return [[tokenizer.bos_id, *ids[first : first + size]] for first in range(0, len(ids), size)]


def _run_gguf(material: Material, file: epath.Path) -> Row:
    row = Row(str(file.relative_to(material.folder.parent)), file.stat().length)
    if not llama_cpp_installed() or not material.config.check_tokens:
        return row
    prompt, new = material.text
    text = prompt + new
    answers = run_llama_cpp(file, texts=_TEXTS, scored=[text], prompts=[prompt], new_tokens=len(new))
    expected = [list(material.stage.tokenizer.encode(part)) for part in _TEXTS]
    if answers.ids != expected:
        wrong = next(part for part, ours, theirs in zip(_TEXTS, expected, answers.ids, strict=True) if ours != theirs)
        raise ValueError(f"{file}: llama.cpp makes other ids of {wrong!r} than the tokenizer that the model was trained with")
    # Rows of the vocabulary without a token are not in the file, and have no probability there.
    known = jnp.asarray(material.reference.logits)[:, : material.stage.tokenizer.vocab_size]
    log_probs = jax.nn.log_softmax(known, axis=-1)
    ours = np.asarray(log_probs)[np.arange(len(text) - 1), text[1:]]
    pairs = zip([*answers.continuations[0], None], [*new, -1], strict=False)
    same = next(index for index, (theirs, token) in enumerate(pairs) if theirs != token)
    return row._replace(
        runtime="llama.cpp", max_difference=float(np.abs(ours - np.asarray(answers.log_probs[0])).max()),
        greedy_agreement=same / len(new), tokens_per_second=answers.decode_tokens_per_second,
    )  # fmt: skip


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
