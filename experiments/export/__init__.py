"""A trained model in the files of other systems, each of which has been run there and compared with ours."""

import dataclasses
from typing import Any, Literal

import jax
from etils import epath

from experiments.export import formats
from experiments.export.card import write_card
from experiments.export.huggingface import export_huggingface
from experiments.results import write_results
from experiments.stages import Stage, load_stage, mesh_for
from lfm_jax.configuration import ConfigError, mistakes_in, nearest
from lfm_jax.interop.export_manifest import MANIFEST, write_manifest
from lfm_jax.interop.gguf_file import TYPES, check_computable
from lfm_jax.interop.gguf_quantize import KINDS
from lfm_jax.models import ComputeConfig
from lfm_jax.sharding import MeshConfig

FOLDER = "export"
_CARD = "README.md"
_SUFFIXES = (".gguf", ".pt2", ".pte", ".onnx", ".onnx.data", ".stablehlo")
Format = Literal["hf", "gguf", "pytorch", "executorch", "onnx", "stablehlo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How a model is written.

    formats: hf is always among them, since others are made of it.
    dtype: of the weights in hf, and so of what is made of it. max_shard_bytes: of a file of weights.
    gguf_types: one file each (`lfm_jax.interop.gguf_file.TYPES`, and with llama-cpp-python `gguf_quantize.KINDS`).
    gguf_importance: a file of text, over the first 65,536 tokens of which it is measured what each weight matters for, for those
      of `KINDS`; None: all matter alike.
    executorch_types: one file each: "none" is float32, "8da4w" 4-bit weights and 8-bit activations.
    capacity: tokens of a sequence in the PyTorch, ExecuTorch and ONNX programs, at most the model's context.
    check_tokens: length of the text, and of its greedy continuation, over which each file is compared with us; 0: hf and gguf are
      not compared.
    """

    formats: tuple[Format, ...] = ("hf",)
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_bytes: int = 5_000_000_000
    gguf_types: tuple[str, ...] = ("F32", "Q8_0", "Q4_0")
    gguf_importance: str | None = None
    executorch_types: tuple[Literal["none", "8da4w"], ...] = ("none", "8da4w")
    capacity: int = 2048
    check_tokens: int = 32

    def __post_init__(self):
        if self.max_shard_bytes < 1 or self.check_tokens < 0:
            raise ValueError(
                f"max_shard_bytes must be positive and check_tokens not negative, got {self.max_shard_bytes} and "
                f"{self.check_tokens}"
            )
        if self.capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {self.capacity}")
        known = list(dict.fromkeys((*TYPES, *KINDS)))
        for kind in self.gguf_types:
            if kind not in known:
                raise ValueError(f"gguf_types: {kind!r} is no type of GGUF file that is written here. {nearest(kind, known)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: the workdir of a run, or a Hugging Face folder; the files are written to export/ in the new workdir."""

    init_from: str
    export: ExportConfig = ExportConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()


def check_export(config: ExportConfig | None) -> None:
    """For the beginning of a run that exports at its end.

    Raises:
      ConfigError: there are several processes (`jax.distributed`), which write hf alone.
    """
    others = [name for name in config.formats if name != "hf"] if config is not None else []
    if others and jax.process_count() > 1:
        raise ConfigError(
            f"--config.export.formats: {jax.process_count()} processes write hf alone, and not {others[0]}; set hf, and once the "
            "run has ended, have the others made of its workdir by configs/export.py in one process."
        )


def export_and_check(config: ExportConfig, stage: Stage, workdir: epath.Path) -> dict[str, Any]:
    """Writes export/ in the workdir, and compares each file with the model in the runtime that it is for.

    Each folder with files has their SHA-256 in MANIFEST.sha256, written last. The files of an earlier export into the workdir are
    removed once hf/ is written and agrees, whatever `formats` are: they are of other weights.

    Returns:
      exports: a row for each file (`formats.Row`). hf_greedy_agrees, hf_logit_difference: of transformers, reading the folder
      (see `export_huggingface`).
    Raises:
      ImportError: a package that a format needs is not installed; the text says how to install it.
      ValueError: a file cannot be made of the model, or does not compute what the model does; the file is not there.
      OSError: something cannot be written; nothing is left of that file.
    """
    others = [name for name in dict.fromkeys(config.formats) if name != "hf"]
    if "gguf" in others:  # before anything is written
        try:
            check_computable(stage.config)
        except ValueError as error:
            rest = ",".join(("hf", *(name for name in others if name != "gguf")))
            raise ValueError(f"{error}. What else there is: --config.export.formats={rest}") from error
    folder = workdir / FOLDER
    rows, figures = export_huggingface(config, stage, folder / "hf")
    if jax.process_index() == 0:
        _remove_earlier(folder)
    if others:
        material = formats.Material(config, stage, folder, folder / "hf")
        rows += [row for name in others for row in formats.EXPORTERS[name](material)]
        write_card(folder / _CARD, stage, rows)
        for each in (folder, folder / formats.GGUF):
            if each.exists():
                write_manifest(each, {})
    return {"exports": [row._asdict() for row in rows], **figures}


def _remove_earlier(folder: epath.Path) -> None:
    """Removes what an earlier export wrote beside hf/, and nothing else."""
    gguf = folder / formats.GGUF
    for each in (folder, gguf):
        for file in list(each.iterdir()) if each.exists() else []:
            ours = file.name.startswith("model") and file.name.endswith(_SUFFIXES)
            if ours or file.name == MANIFEST or file == folder / _CARD:
                file.unlink()
    if gguf.exists() and not any(gguf.iterdir()):
        gguf.rmdir()


def main(config: Config, workdir: epath.Path) -> None:
    """Writes the files, and what the comparisons say as a table."""
    check_export(config.export)
    stage = load_stage(config.init_from, config.compute, mesh_for(config.mesh))
    try:
        with mistakes_in("export"):
            figures = export_and_check(config.export, stage, workdir)
    except ImportError as error:
        raise ConfigError(f"--config.export.formats: {error}") from error
    except OSError as error:
        raise ConfigError(f"--config.export: {error}") from error
    formats.print_table([formats.Row(**row) for row in figures["exports"]])
    write_results(workdir, figures, config)
