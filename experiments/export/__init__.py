"""A trained model in the files of other systems, each of which has been run there and compared with ours."""

import dataclasses
from typing import Any, Literal

from etils import epath

from experiments.export import formats
from experiments.export.card import write_card
from experiments.export.huggingface import export_huggingface
from experiments.results import write_results
from experiments.stages import Stage, load_stage, mesh_for
from lfm_jax.configuration import ConfigError, mistakes_in
from lfm_jax.interop.export_manifest import MANIFEST, write_manifest
from lfm_jax.models import ComputeConfig
from lfm_jax.sharding import MeshConfig

FOLDER = "export"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: the workdir of a run, or a Hugging Face folder; the files are written to export/ in the new workdir."""

    init_from: str
    export: ExportConfig = ExportConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()


def export_and_check(config: ExportConfig, stage: Stage, workdir: epath.Path) -> dict[str, Any]:
    """Writes export/ in the workdir, and compares each file with the model in the runtime that it is for.

    Each folder with files has their SHA-256 in MANIFEST.sha256, written last.

    Returns:
      exports: a row for each file (`formats.Row`). hf_greedy_agrees, hf_logit_difference: of transformers, reading the folder
      (see `export_huggingface`).
    """
    folder = workdir / FOLDER
    rows, figures = export_huggingface(config, stage, folder / "hf")
    others = [name for name in dict.fromkeys(config.formats) if name != "hf"]
    if others:
        material = formats.Material(config, stage, folder, folder / "hf")
        written = [folder, folder / formats.GGUF]
        for each in written:
            (each / MANIFEST).unlink(missing_ok=True)  # of an earlier export, with other files
        rows += [row for name in others for row in formats.EXPORTERS[name](material)]
        write_card(folder / "README.md", stage, rows)
        for each in written:
            if each.exists():
                write_manifest(each, {})
    return {"exports": [row._asdict() for row in rows], **figures}


def main(config: Config, workdir: epath.Path) -> None:
    """Writes the files, and what the comparisons say as a table."""
    stage = load_stage(config.init_from, config.compute, mesh_for(config.mesh))
    try:
        with mistakes_in("export"):
            figures = export_and_check(config.export, stage, workdir)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--config.export.formats: {error}") from error
    formats.print_table([formats.Row(**row) for row in figures["exports"]])
    write_results(workdir, figures, config)
