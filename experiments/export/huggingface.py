"""The Hugging Face folder, and whether transformers reads the same model out of it."""

import functools
import logging
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.export.formats import PROMPT, Row, continued, installed, other_choice, settings_for, tolerated
from experiments.stages import Stage, model_functions
from lfm_jax.arrays import Tokens
from lfm_jax.interop import export_folder
from lfm_jax.interop.exported_file import compare
from lfm_jax.models import ComputeConfig, FunctionalModel
from lfm_jax.models.functional import Tree

if TYPE_CHECKING:
    from experiments.export import ExportConfig


def export_huggingface(config: "ExportConfig", stage: Stage, folder: epath.Path) -> tuple[list[Row], dict[str, Any]]:
    """Writes the folder, and compares it with the model where transformers and PyTorch are installed, before it has its name.

    Of several processes the first writes, and nothing is compared.

    Returns:
      A row for each file, and hf_greedy_agrees: whether transformers, reading the folder, continues a text greedily by the same
      ids (if not, by one that is as likely); hf_logit_difference: the largest over all of these positions and the whole
      vocabulary, in float32. Both are None where there was no comparison.
    Raises:
      ValueError: transformers makes other ids of the text, or other logits, or chooses other tokens; the folder is not there.
      ValueError, OSError: see `export_folder`.
    """
    agrees, difference = None, None

    def check(written: epath.Path) -> None:
        nonlocal agrees, difference
        try:
            agrees, difference = _compare(config, stage, written)
        except ValueError as error:
            raise ValueError(f"{folder} is not written, since in transformers {error}") from error

    export_folder(
        stage.config, stage.params, stage.buffers, folder,
        tokenizer=stage.tokenizer_path, dtype=config.dtype, max_shard_bytes=config.max_shard_bytes,
        generation=settings_for(stage.tokenizer), check=check,
    )  # fmt: skip
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
    if not installed("torch", "transformers") or config.check_tokens == 0 or jax.process_count() > 1:
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
        logits = np.asarray(_logits(functions, rounded, stage.buffers, jnp.asarray([prompt + new])))
    if generated[: len(prompt)] != prompt:
        raise ValueError(f"the ids of {PROMPT!r} are {generated[: len(prompt)]}, and {prompt} to the tokenizer of the model")
    difference, _ = compare(expected, logits)
    theirs = generated[len(prompt) :]
    if other_choice(logits[len(prompt) - 1 :], new, theirs, tolerated(logits)):
        raise ValueError(f"the greedy continuation is {theirs}, and {new} here, with logits that differ by {difference:.3g}")
    return theirs == new, difference


@functools.partial(jax.jit, static_argnums=0)
def _logits(functions: FunctionalModel, params: Tree, buffers: Tree, tokens: Tokens) -> jax.Array:
    """[seq, vocab] of the one row of `tokens`."""
    model = functions.bind(params, buffers)
    return model.logits(model(tokens).hidden)[0]
