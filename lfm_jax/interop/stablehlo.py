"""The forward pass as StableHLO (`jax.export`): a file that any later JAX, and other readers of StableHLO, run without this code.

    exported = export_stablehlo(config, params, buffers, "model.stablehlo", reference, platforms=("cpu", "tpu"))
    logits = load_stablehlo("model.stablehlo", params, buffers)(tokens)

The file has the program alone, for any batch and length. Its weights are arguments: those of an exported folder, or of any
checkpoint of the same architecture.
"""

import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from lfm_jax.interop.export_manifest import check_file
from lfm_jax.interop.exported_file import ExportedFile, Reference, compare, finished, whole_file
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, functional
from lfm_jax.models.functional import Tree

# Those of jax.export; a program is lowered for each, whether it is here or not.
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# What the model asks of a length while it is traced has one answer from here on.
_LEAST_SEQ = 16


def export_stablehlo(
    config: ModelConfig,
    params: Tree,
    buffers: Tree,
    path: str | os.PathLike,
    reference: Reference,
    *,
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
) -> ExportedFile:
    """Writes (weights, tokens [batch, seq] int32) -> logits [batch, seq, vocab] float32, in operations that all platforms have.

    Its products are of float32 on all of them, also where others are faster (default_matmul_precision "highest").

    weights: name, such as "layers.0.mlp.gate", to float32 array. seq: 16 or more; `load_stablehlo` pads shorter texts.

    JAX promises to read the file for six months (https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).

    Args:
      platforms: that it shall run on; this one must be among them.
    Raises:
      ValueError: an unknown platform, this one is missing, or the file's logits are not those of the reference.
      OSError: it cannot be written. Nothing is left of it then, as after every other error.
    """
    here = _here()
    unknown = [platform for platform in platforms if platform not in _PLATFORMS]
    if unknown or here not in platforms:
        wrong = f"unknown platform {unknown[0]!r}" if unknown else f"the platforms lack this one, {here!r}, where the file is run"
        raise ValueError(f"{wrong}; choose from {', '.join(_PLATFORMS)}")
    plain = ComputeConfig(dtype="float32", short_conv="reference", attention="reference", grouped_matmul="reference")
    functions = functional(lambda rngs: Decoder(config, plain, rngs=rngs))

    abstract = functions.abstract_params, functions.abstract_buffers

    def forward(weights: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        model = functions.bind(*jax.tree.unflatten(jax.tree.structure(abstract), [weights[name] for name in _named(*abstract)]))
        return model.logits(model(tokens).hidden)

    shape = export.symbolic_shape("batch, seq", constraints=[f"seq >= {_LEAST_SEQ}"])
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    with jax.default_matmul_precision("highest"):
        exported = export.export(jax.jit(forward), platforms=platforms)(_named(*abstract), tokens)
    with whole_file(path) as file:
        file.write_bytes(exported.serialize())
        logits = load_stablehlo(file, params, buffers)(reference.tokens[None].astype(np.int32))
        found = compare(np.asarray(logits[0]), reference.logits)
    return finished(path, found)


def load_stablehlo(path: str | os.PathLike, params: Tree, buffers: Tree) -> Callable[[jax.Array], jax.Array]:
    """The compiled function tokens [batch, seq] int32 -> logits [batch, seq, vocab] of a file and its weights.

    Raises:
      ValueError: the file is damaged, is not what a manifest beside it says, is for other platforms, or is of a model with other
        parameters; the text names the first.
    """
    check_file(path)
    try:
        exported = export.deserialize(bytearray(pathlib.Path(path).read_bytes()))
    except Exception as error:  # of the reader of FlatBuffers, which has no class for it
        raise ValueError(f"{path} is no file of jax.export, or damaged: {error}") from error
    here = _here()
    if here not in exported.platforms:
        raise ValueError(f"{path} is for {', '.join(exported.platforms)}, and this is {here}; export it for this one as well")
    (wanted, _), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    weights = _named(params, buffers)
    shapes = lambda arrays: {name: array.shape for name, array in arrays.items()}
    ours, theirs = shapes(weights), shapes(wanted)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(f"{path} is of another model: for {name} it wants {theirs.get(name)}, and got {ours.get(name)}")
    call = jax.jit(exported.call)

    def logits(tokens: jax.Array) -> jax.Array:
        short = max(0, _LEAST_SEQ - tokens.shape[1])  # what stands behind a token changes nothing before it
        return call(weights, jnp.pad(tokens, ((0, 0), (0, short))))[:, : tokens.shape[1]]

    return logits


def _here() -> str:
    """This platform, as jax.export calls it."""
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def _named(params: Tree, buffers: Tree) -> dict[str, jax.Array]:
    """Name of each array to it, in the order of their leaves."""
    leaves = jax.tree_util.tree_flatten_with_path((params, buffers))[0]
    return {".".join(str(key.key) for key in path[1:]): leaf for path, leaf in leaves}
