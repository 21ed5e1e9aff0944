"""The table between the decoder's parameters and the tensors of a Hugging Face checkpoint.

Every parameter has one entry. PyTorch's linear layers hold [out, in] where ours hold [in, out]; a Conv1d holds
[channels, 1, width]; and a checkpoint has a tensor for each expert where we have a stack.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lfm_jax.interop.huggingface_config import Family, family
from lfm_jax.models import Decoder, LayerType, ModelConfig, functional
from lfm_jax.models.functional import Tree

Path = tuple[str | int, ...]

# same: as it is. flat: one axis. linear: [in, *out] -> [out, in]. merged: [*in, out] -> [out, in]. taps: [width, channels] ->
# [channels, 1, width].
_Layout = Literal["same", "flat", "linear", "merged", "taps"]


class _Entry(NamedTuple):
    """name: behind the layer's prefix; "{}" stands for the expert. aliases: other names that checkpoints use."""

    name: str
    layout: _Layout
    aliases: tuple[str, ...] = ()


class Weight(NamedTuple):
    """One tensor of a checkpoint.

    path: of our parameter or buffer. expert: its index in our stack, or None. name, aliases: full names in the checkpoint.
    shape, own_shape: of the tensor there and of our array (without the axis of experts).
    """

    path: Path
    expert: int | None
    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    own_shape: tuple[int, ...]
    transposed: bool

    def to_checkpoint(self, own: np.ndarray) -> np.ndarray:
        """Our array (the whole stack for an expert) as the checkpoint's tensor; a view wherever NumPy can make one."""
        own = own if self.expert is None else own[self.expert]
        return (own.reshape(-1, self.shape[0]).T if self.transposed else own).reshape(self.shape)

    def from_checkpoint(self, tensor: np.ndarray) -> np.ndarray:
        """The inverse, without the axis of experts."""
        return (tensor.reshape(self.shape[0], -1).T if self.transposed else tensor).reshape(self.own_shape)


_MODEL = {
    "embed.embedding": _Entry("model.embed_tokens.weight", "same"),
    "final_norm.scale": _Entry("model.embedding_norm.weight", "same"),
    "lm_head": _Entry("lm_head.weight", "linear"),
}
_LAYER = {
    "operator_norm.scale": _Entry("operator_norm.weight", "same"),
    "ffn_norm.scale": _Entry("ffn_norm.weight", "same"),
    "post_operator_norm.scale": _Entry("post_operator_norm.weight", "same"),
    "post_ffn_norm.scale": _Entry("post_ffn_norm.weight", "same"),
    "mlp.gate": _Entry("feed_forward.w1.weight", "linear"),
    "mlp.up": _Entry("feed_forward.w3.weight", "linear"),
    "mlp.down": _Entry("feed_forward.w2.weight", "linear"),
    "moe.router": _Entry("feed_forward.gate.weight", "linear"),
    "moe.expert_bias": _Entry("feed_forward.expert_bias", "same"),
    "moe.gate": _Entry("feed_forward.experts.{}.w1.weight", "linear"),
    "moe.up": _Entry("feed_forward.experts.{}.w3.weight", "linear"),
    "moe.down": _Entry("feed_forward.experts.{}.w2.weight", "linear"),
}
_CONV = {
    "operator.in_proj": _Entry("conv.in_proj.weight", "linear"),
    "operator.in_bias": _Entry("conv.in_proj.bias", "flat"),
    "operator.kernel": _Entry("conv.conv.weight", "taps"),
    "operator.kernel_bias": _Entry("conv.conv.bias", "same"),
    "operator.out_proj": _Entry("conv.out_proj.weight", "linear"),
    "operator.out_bias": _Entry("conv.out_proj.bias", "same"),
}
_ATTENTION = {
    "operator.q_proj": _Entry("self_attn.q_proj.weight", "linear"),
    "operator.k_proj": _Entry("self_attn.k_proj.weight", "linear"),
    "operator.v_proj": _Entry("self_attn.v_proj.weight", "linear"),
    # Published checkpoints say gate_proj, transformers' module g_proj.
    "operator.gate_proj": _Entry("self_attn.gate_proj.weight", "linear", ("self_attn.g_proj.weight",)),
}
_LFM2_ATTENTION = _ATTENTION | {
    "operator.q_norm.scale": _Entry("self_attn.q_layernorm.weight", "same"),
    "operator.k_norm.scale": _Entry("self_attn.k_layernorm.weight", "same"),
    "operator.out_proj": _Entry("self_attn.out_proj.weight", "merged"),
}
_LFM3_ATTENTION = _ATTENTION | {
    "operator.q_norm.scale": _Entry("self_attn.q_norm.weight", "same"),
    "operator.k_norm.scale": _Entry("self_attn.k_norm.weight", "same"),
    "operator.out_proj": _Entry("self_attn.o_proj.weight", "merged"),
}


def _operator(kind: LayerType, architecture: Family) -> dict[str, _Entry]:
    if kind == "conv":
        return _CONV
    return _LFM3_ATTENTION if architecture == "lfm3" else _LFM2_ATTENTION


def weight_table(config: ModelConfig) -> list[Weight]:
    """Every tensor of the checkpoint of `config`; the tensors of one of our arrays stand together.

    Raises:
      ValueError: no Hugging Face architecture has this configuration.
    """
    architecture = family(config)
    layers = [_LAYER | _operator(kind, architecture) for kind in config.layer_types]
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    table = []
    for tree in (functions.abstract_params, functions.abstract_buffers):
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            path = tuple(key.key for key in keys)
            prefix = f"model.layers.{path[1]}." if path[0] == "layers" else ""
            entry = layers[path[1]][".".join(path[2:])] if prefix else _MODEL[".".join(path)]
            table += _weights(path, prefix, entry, leaf.shape)
    return table


def _weights(path: Path, prefix: str, entry: _Entry, shape: tuple[int, ...]) -> list[Weight]:
    stacked = "{}" in entry.name
    own_shape = shape[1:] if stacked else shape
    other = {
        "same": own_shape,
        "flat": (math.prod(own_shape),),
        "linear": (math.prod(own_shape[1:]), own_shape[0]),
        "merged": (own_shape[-1], math.prod(own_shape[:-1])),
        "taps": (own_shape[-1], 1, own_shape[0]),
    }[entry.layout]
    transposed = entry.layout not in ("same", "flat")
    return [
        Weight(
            path=path,
            expert=expert,
            name=prefix + entry.name.format(expert),
            aliases=tuple(prefix + alias for alias in entry.aliases),
            shape=other,
            own_shape=own_shape,
            transposed=transposed,
        )
        for expert in (range(shape[0]) if stacked else [None])
    ]


def is_buffer(path: Path) -> bool:
    """Whether the parameter is a buffer, which carries no gradient."""
    return path[-1] == "expert_bias"


def grouped(table: list[Weight]) -> Iterator[tuple[Path, list[Weight]]]:
    """The tensors of each of our parameters, in the order of the table."""
    groups: dict[Path, list[Weight]] = {}
    for weight in table:
        groups.setdefault(weight.path, []).append(weight)
    return iter(groups.items())


def look_up(tree: Tree, path: Path) -> Any:
    """The leaf at a path; None: there is none."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def check_parameters(table: list[Weight], params: Tree, buffers: Tree) -> None:
    """Refuses parameters that are not exactly those of the configuration."""
    known = set()
    for path, weights in grouped(table):
        leaf = look_up(buffers if is_buffer(path) else params, path)
        shape = weights[0].own_shape if weights[0].expert is None else (len(weights), *weights[0].own_shape)
        if leaf is None or leaf.shape != shape:
            found = "is missing" if leaf is None else f"has shape {leaf.shape}"
            raise ValueError(f"parameter {_dotted(path)} {found}; the configuration wants shape {shape}")
        known.add(path)
    for leaf_path, _ in jax.tree_util.tree_flatten_with_path((params, buffers))[0]:
        path = tuple(key.key for key in leaf_path[1:])
        if path not in known:
            raise ValueError(f"parameter {_dotted(path)} has no place in a Hugging Face checkpoint of this configuration")


def on_host(leaf: Any) -> np.ndarray:
    """The whole array, of one that is split over several hosts as well, if all of them call this.

    A jax.Array keeps the host copy that it was asked for as long as it lives; asked of a copy, both can go.
    """
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(jnp.copy(leaf)) if isinstance(leaf, jax.Array) else np.asarray(leaf)
