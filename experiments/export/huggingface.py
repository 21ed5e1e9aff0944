"""The Hugging Face folder, and whether transformers reads the same model out of it."""

import functools
import logging
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.export.formats import PROMPT, Row, continued, installed, settings_for
from experiments.stages import Stage, model_functions
from lfm_jax.arrays import Tokens
from lfm_jax.interop import export_folder
from lfm_jax.models import ComputeConfig, FunctionalModel
from lfm_jax.models.functional import Tree

if TYPE_CHECKING:
    from experiments.export import ExportConfig


def export_huggingface(config: "ExportConfig", stage: Stage, folder: epath.Path) -> tuple[list[Row], dict[str, Any]]:
    """Writes the folder, and compares it with the model where transformers and PyTorch are installed.

    Returns:
      A row for each file, and hf_greedy_agrees: whether transformers, reading the folder, makes the same ids of a text and
      continues them greedily by the same ids; hf_logit_difference: the largest over all of these positions and the whole
      vocabulary, in float32. Both are None where there was no comparison.
    """
    folder = export_folder(
        stage.config, stage.params, stage.buffers, folder,
        tokenizer=stage.tokenizer_path, dtype=config.dtype, max_shard_bytes=config.max_shard_bytes,
        generation=settings_for(stage.tokenizer),
    )  # fmt: skip
    agrees, difference = _compare(config, stage, folder)
    rows = [Row(str(file.relative_to(folder.parent.parent)), file.stat().length) for file in sorted(folder.iterdir())]
    if agrees is not None:
        told = {"runtime": "transformers", "max_difference": difference, "greedy_agreement": float(agrees)}
        weights = next(index for index, row in enumerate(rows) if row.file.endswith(".safetensors"))
        rows[weights] = rows[weights]._replace(**told)
    return rows, {"hf_greedy_agrees": agrees, "hf_logit_difference": difference}


def quiet_transformers() -> None:
    """Imports transformers and PyTorch without what they say of kernels for other hardware, and without their progress bars."""
    import torch  # noqa: F401 (it sets its loggers when it is imported)

    for library in ("torch.utils", "torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _compare(config: "ExportConfig", stage: Stage, folder: epath.Path) -> tuple[bool | None, float | None]:
    if not installed("torch", "transformers") or config.check_tokens == 0:
        return None, None
    quiet_transformers()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Both sides compute in float32 from the weights as they were written.
    rounded = jax.tree.map(lambda leaf: leaf.astype(config.dtype).astype(jnp.float32), stage.params)
    prompt = [stage.tokenizer.bos_id, *stage.tokenizer.encode(PROMPT)]
    new = continued(stage, rounded, prompt, config.check_tokens, settings_for(stage.tokenizer).eos_ids)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    functions = model_functions(stage.config, ComputeConfig(dtype="float32"))
    with jax.default_matmul_precision("highest"), torch.inference_mode():
        ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
        generated = theirs.generate(ids, max_new_tokens=config.check_tokens)[0].tolist()
        expected = theirs(torch.tensor([prompt + new])).logits[0].numpy()
        logits = _logits(functions, rounded, stage.buffers, jnp.asarray([prompt + new]))
    return generated == prompt + new, float(np.abs(np.asarray(logits) - expected).max())


@functools.partial(jax.jit, static_argnums=0)
def _logits(functions: FunctionalModel, params: Tree, buffers: Tree, tokens: Tokens) -> jax.Array:
    """[seq, vocab] of the one row of `tokens`."""
    model = functions.bind(params, buffers)
    return model.logits(model(tokens).hidden)[0]
