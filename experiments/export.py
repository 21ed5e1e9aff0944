"""A trained model as a Hugging Face folder, and the proof that others read the same model out of it."""

import dataclasses
import functools
import importlib.util
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from data_pipelines import Tokenizer
from experiments.results import write_results
from experiments.stages import Stage, load_stage, mesh_for, model_functions
from lfm_jax.arrays import Tokens
from lfm_jax.generation import Engine, Request, SamplingConfig
from lfm_jax.interop import GenerationSettings, export_folder
from lfm_jax.models import ComputeConfig, FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import MeshConfig

_PROMPT = "The first line of the file says"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How a model is written.

    dtype: of the weights. max_shard_bytes: of a file of weights.
    check_tokens: length of the text, and of its greedy continuation, over which transformers is compared with us; 0: no check.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_bytes: int = 5_000_000_000
    check_tokens: int = 32

    def __post_init__(self):
        if self.max_shard_bytes < 1 or self.check_tokens < 0:
            raise ValueError(
                f"max_shard_bytes must be positive and check_tokens not negative, got {self.max_shard_bytes} and "
                f"{self.check_tokens}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: the workdir of a run, or a Hugging Face folder; the model is written to export/hf in the new workdir."""

    init_from: str
    export: ExportConfig = ExportConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()


def export_and_check(config: ExportConfig, stage: Stage, workdir: epath.Path) -> dict[str, Any]:
    """Writes export/hf in the workdir, and compares it with the model where transformers and PyTorch are installed.

    Returns:
      exports: a row for each file.
      hf_greedy_agrees: whether transformers, reading the folder, makes the same ids of a text and continues them greedily by the
        same ids. hf_logit_difference: the largest over all of these positions and the whole vocabulary, in float32. Both are None
        where there was no comparison.
    """
    folder = export_folder(
        stage.config, stage.params, stage.buffers, workdir / "export" / "hf",
        tokenizer=stage.tokenizer_path, dtype=config.dtype, max_shard_bytes=config.max_shard_bytes,
        generation=_generation(stage.tokenizer),
    )  # fmt: skip
    rows = [{"file": f"export/hf/{file.name}", "bytes": file.stat().length} for file in sorted(folder.iterdir())]
    agrees, difference = _compare(config, stage, folder)
    return {"exports": rows, "hf_greedy_agrees": agrees, "hf_logit_difference": difference}


def quiet_transformers() -> None:
    """Imports transformers and PyTorch without what they say of kernels for other hardware, and without their progress bars."""
    import torch  # noqa: F401 (it sets its loggers when it is imported)

    for library in ("torch.utils", "torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _generation(tokenizer: Tokenizer) -> GenerationSettings:
    return GenerationSettings(bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id)


def _compare(config: ExportConfig, stage: Stage, folder: epath.Path) -> tuple[bool | None, float | None]:
    installed = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if not installed or config.check_tokens == 0:
        return None, None
    quiet_transformers()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Both sides compute in float32 from the weights as they were written.
    rounded = jax.tree.map(lambda leaf: leaf.astype(config.dtype).astype(jnp.float32), stage.params)
    functions = model_functions(stage.config, ComputeConfig(dtype="float32"))
    prompt = [stage.tokenizer.bos_id, *stage.tokenizer.encode(_PROMPT)]
    greedy = SamplingConfig(temperature=0, max_new_tokens=config.check_tokens)
    stop_ids = _generation(stage.tokenizer).eos_ids
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with jax.default_matmul_precision("highest"), torch.inference_mode():
        request = Request(prompt=tuple(prompt), sampling=greedy, stop_ids=stop_ids)
        (answer,) = Engine(functions, stage.config, rounded, stage.buffers).run([request])
        new = answer.tokens
        ids = AutoTokenizer.from_pretrained(folder)(_PROMPT, return_tensors="pt").input_ids
        continued = theirs.generate(ids, max_new_tokens=config.check_tokens)[0].tolist()
        expected = theirs(torch.tensor([prompt + new])).logits[0].numpy()
        logits = _logits(functions, rounded, stage.buffers, jnp.asarray([prompt + new]))
    return continued == prompt + new, float(np.abs(np.asarray(logits) - expected).max())


@functools.partial(jax.jit, static_argnums=0)
def _logits(functions: FunctionalModel, params: Tree, buffers: Tree, tokens: Tokens) -> jax.Array:
    """[seq, vocab] of the one row of `tokens`."""
    model = functions.bind(params, buffers)
    return model.logits(model(tokens).hidden)[0]


def main(config: Config, workdir: epath.Path) -> None:
    """Writes the folder and what the comparison says."""
    stage = load_stage(config.init_from, config.compute, mesh_for(config.mesh))
    write_results(workdir, export_and_check(config.export, stage, workdir), config)
