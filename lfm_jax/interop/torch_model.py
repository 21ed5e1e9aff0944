"""The hybrid in plain PyTorch, to read in one sitting and to run without transformers; exports for devices are traced from it.

It computes in float32. Functions over `torch.nn.ModuleDict`s whose names are those of `lfm_jax.models`, because PyTorch is
imported only where it is used. What a sequence has left behind is an explicit input and output:

    model = load_torch_model("exported")
    state = initial_state(model.config, batch=1, capacity=128)
    logits, state = model(prompt, state)      # [1, seq, vocab]
    logits, state = model(next_token, state)  # [1, 1, vocab]
"""

from __future__ import annotations

import typing

from etils import epath

from lfm_jax.interop.huggingface import import_folder
from lfm_jax.interop.huggingface_weights import Path
from lfm_jax.models import ModelConfig, MoEConfig, RopeConfig

if typing.TYPE_CHECKING:
    import numpy as np
    import torch

# First the tokens that each sequence has had, [1] int64. Then of each block in turn: of a convolution the last width - 1 values
# of B * x, [batch, width - 1, channels], oldest first; of an attention the keys (after norm and rotation) and the values, each
# [batch, kv_heads, capacity, head_dim], in the slots of their positions.
State = tuple["torch.Tensor", ...]

_HIDDEN_SCORE = -1e9  # for what may not be seen; infinity would be NaN to runtimes whose exponential is approximate
# Of our parameters, where PyTorch's name is not ours + ".weight".
_NAMES = {
    "embedding": "weight", "scale": "weight", "kernel": "conv.weight", "kernel_bias": "conv.bias", "in_bias": "in_proj.bias",
    "out_bias": "out_proj.bias", "expert_bias": "router.expert_bias",
}  # fmt: skip


def load_torch_model(folder: epath.PathLike) -> torch.nn.Module:
    """Reads a Hugging Face folder of an LFM2, LFM2-MoE or LFM3 model.

    Returns:
      A module in evaluation mode, whose parameters take no gradient. A call of it is `(tokens, state) -> (logits, state)`, with
        tokens: [batch, seq] int64, the next tokens of sequences that are equally long;
        state: what was before them (`initial_state`), which must have room for them;
        logits: [batch, seq, vocab] float32, padded rows of the vocabulary included.
      Its parts are `config`, `embed`, `layers`, `final_norm` and `lm_head`, which is None if tied; `hidden(tokens, state)` and
      `logits(hidden)` are the two halves of a call.
    Raises:
      ModuleNotFoundError: PyTorch is not installed.
      FileNotFoundError, ValueError: the folder is incomplete or damaged; see `import_folder`.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("PyTorch is not installed; run: pip install -c constraints.txt -e '.[export]'") from error
    tensors: dict[str, torch.Tensor] = {}
    config = import_folder(folder, place=lambda path, array: tensors.update(_named(path, array))).config
    with torch.device("meta"):
        model = _model(config)
    model.load_state_dict(tensors, assign=True)
    model.place_frequencies()
    return model.requires_grad_(False).eval()


def _named(path: Path, array: np.ndarray) -> dict[str, torch.Tensor]:
    """One of our parameters under PyTorch's name, in its layout: [out, in] where ours is [in, out]."""
    import torch

    *front, name = map(str, path)
    full = ".".join([*front, _NAMES.get(name, f"{name}.weight")])
    tensor = torch.from_numpy(array)
    if name in ("scale", "embedding", "kernel_bias", "out_bias", "expert_bias"):
        return {full: tensor}
    if name == "in_bias":
        return {full: tensor.reshape(-1)}
    if name == "kernel":
        return {full: tensor.T[:, None].contiguous()}
    if front[-1:] == ["moe"] and name != "router":
        prefix = ".".join(front)
        return {f"{prefix}.experts.{index}.{name}.weight": part.T.contiguous() for index, part in enumerate(tensor)}
    matrix = tensor.reshape(-1, tensor.shape[-1]) if name == "out_proj" else tensor.reshape(tensor.shape[0], -1)
    return {full: matrix.T.contiguous()}


def _model(config: ModelConfig) -> torch.nn.Module:
    """The module, its parameters not yet filled."""
    import torch

    class Hybrid(torch.nn.Module):
        """See `load_torch_model`."""

        def __init__(self):
            super().__init__()
            self.config = config
            self.embed = torch.nn.Embedding(config.vocab_size, config.embed_dim)
            self.layers = torch.nn.ModuleList(_block_parts(config, index) for index in range(config.num_layers))
            self.final_norm = torch.nn.RMSNorm(config.embed_dim, config.norm_eps)
            linear = lambda: torch.nn.Linear(config.embed_dim, config.vocab_size, bias=False)
            self.lm_head = None if config.tie_embeddings else linear()

        def place_frequencies(self) -> None:
            for kind, rope in (("full_attention", config.full_rope), ("sliding_attention", config.sliding_rope)):
                self.register_buffer(f"{kind}_frequency", _frequencies(rope, config.head_dim), persistent=False)

        def hidden(self, tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
            length, *rest = state
            positions = length + torch.arange(tokens.shape[1])
            left = [length + tokens.shape[1]]
            views = _views(self, positions, left[0], rest)
            hidden = self.embed(tokens)
            for kind, parts in zip(config.layer_types, self.layers, strict=True):
                own, rest = (rest[:1], rest[1:]) if kind == "conv" else (rest[:2], rest[2:])
                hidden, own = _block(parts, config, kind, hidden, positions, views.get(kind), own)
                left += own
            return self.final_norm(hidden), tuple(left)

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(hidden, self.embed.weight) if self.lm_head is None else self.lm_head(hidden)

        def forward(self, tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
            hidden, state = self.hidden(tokens, state)
            return self.logits(hidden), state

    return Hybrid()


def initial_state(config: ModelConfig, batch: int, capacity: int) -> State:
    """Of sequences that have no token yet and will have `capacity` at most: zeros."""
    import torch

    window = (batch, config.conv_width - 1, config.embed_dim)
    slots = (batch, config.num_kv_heads, capacity, config.head_dim)
    shapes = [shape for kind in config.layer_types for shape in ([window] if kind == "conv" else [slots] * 2)]
    return torch.zeros(1, dtype=torch.int64), *map(torch.zeros, shapes)


def state_names(config: ModelConfig) -> list[str]:
    """One for each tensor of a state: "length", "layers.0.window", ..., "layers.2.keys", "layers.2.values", ..."""
    parts = lambda kind: ["window"] if kind == "conv" else ["keys", "values"]
    return ["length"] + [f"layers.{index}.{part}" for index, kind in enumerate(config.layer_types) for part in parts(kind)]


def _block_parts(config: ModelConfig, index: int) -> torch.nn.ModuleDict:
    from torch import nn

    embed, heads, kv_heads, head_dim = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    linear = lambda inputs, outputs, bias=False: nn.Linear(inputs, outputs, bias=bias)
    norm = lambda features: nn.RMSNorm(features, config.norm_eps)
    if config.layer_types[index] == "conv":
        operator = {
            "in_proj": linear(embed, 3 * embed, config.conv_bias),
            "conv": nn.Conv1d(embed, embed, config.conv_width, groups=embed, bias=config.conv_bias),
            "out_proj": linear(embed, embed, config.conv_bias),
        }
    else:
        operator = {
            "q_proj": linear(embed, heads * head_dim), "k_proj": linear(embed, kv_heads * head_dim),
            "v_proj": linear(embed, kv_heads * head_dim), "out_proj": linear(heads * head_dim, embed),
            "q_norm": norm(head_dim), "k_norm": norm(head_dim),
        }  # fmt: skip
        if config.attention_gate:
            operator["gate_proj"] = linear(embed, heads)
    parts = {"operator_norm": norm(embed), "operator": nn.ModuleDict(operator), "ffn_norm": norm(embed)}
    if config.sandwich_norms:
        parts |= {"post_operator_norm": norm(embed), "post_ffn_norm": norm(embed)}
    mlp = lambda width: nn.ModuleDict({"gate": linear(embed, width), "up": linear(embed, width), "down": linear(width, embed)})
    if config.is_moe_layer(index):
        moe = {"router": linear(embed, config.moe.num_experts)}
        if config.moe.expert_bias:
            moe["router"].register_buffer("expert_bias", moe["router"].weight.new_zeros(config.moe.num_experts))
        moe["experts"] = nn.ModuleList(mlp(config.moe.mlp_dim) for _ in range(config.moe.num_experts))
        return nn.ModuleDict(parts | {"moe": nn.ModuleDict(moe)})
    return nn.ModuleDict(parts | {"mlp": mlp(config.mlp_dim)})


def _block(parts, config: ModelConfig, kind: str, hidden, positions, view, state):
    """h + operator(norm(h)), then h + feed_forward(norm(h)); LFM3 norms each branch once more before it joins."""
    normed = parts["operator_norm"](hidden)
    if kind == "conv":
        branch, state = _short_conv(parts["operator"], normed, *state)
    else:
        branch, state = _attention(parts["operator"], config, normed, positions, view, *state)
    hidden = hidden + (parts["post_operator_norm"](branch) if config.sandwich_norms else branch)
    normed = parts["ffn_norm"](hidden)
    branch = _moe(parts["moe"], config.moe, normed) if "moe" in parts else _mlp(parts["mlp"], normed)
    return hidden + (parts["post_ffn_norm"](branch) if config.sandwich_norms else branch), state


def _short_conv(parts, x, window):
    """out_proj(C * conv(B * x)): taps over the window and the new values, of which the last become the next window."""
    import torch

    b, c, x = parts["in_proj"](x).chunk(3, dim=-1)
    seen = torch.cat([window, b * x], dim=1)
    mixed = parts["conv"](seen.transpose(1, 2)).transpose(1, 2)
    return parts["out_proj"](c * mixed), [seen[:, seen.shape[1] - window.shape[1] :]]


def _attention(parts, config: ModelConfig, x, positions, view, keys, values):
    """Grouped-query attention over the slots that have been filled. view: cos, sin and scores to add, from `_views`."""
    import torch

    batch, seq, _ = x.shape
    cos, sin, bias = view
    heads = lambda name: parts[name](x).view(batch, seq, -1, config.head_dim)
    query = _rotate(parts["q_norm"](heads("q_proj")).transpose(1, 2), cos, sin)
    key = _rotate(parts["k_norm"](heads("k_proj")).transpose(1, 2), cos, sin)
    keys = keys.index_copy(2, positions, key)
    values = values.index_copy(2, positions, heads("v_proj").transpose(1, 2))
    # The heads that share keys and values become rows of one product: nothing is repeated.
    groups, filled = batch * config.num_kv_heads, bias.shape[1]
    seen = lambda slots: slots[:, :, :filled].reshape(groups, filled, config.head_dim)
    scores = torch.bmm(query.reshape(groups, -1, config.head_dim), seen(keys).transpose(1, 2)) * config.head_dim**-0.5
    weights = (scores.view(batch, config.num_heads, seq, filled) + bias).softmax(dim=-1)
    out = torch.bmm(weights.view(groups, -1, filled), seen(values))
    out = out.view(batch, config.num_heads, seq, config.head_dim).transpose(1, 2)
    if config.attention_gate:
        out = out * parts["gate_proj"](x).sigmoid()[..., None]
    return parts["out_proj"](out.reshape(batch, seq, -1)), [keys, values]


def _mlp(parts, x):
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    gate = parts["gate"](x)
    return parts["down"](gate * gate.sigmoid() * parts["up"](x))


def _moe(parts, config: MoEConfig, x):
    """Every expert computes every token, and what was not chosen has weight 0: num_experts / experts_per_token times the work.

    Which experts run would otherwise depend on the values, which a traced program without branches cannot express.
    """
    import torch

    scores = parts["router"](x).sigmoid()
    choice = scores + parts["router"].expert_bias if config.expert_bias else scores
    chosen = choice.topk(config.experts_per_token, dim=-1).indices
    weights = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * scores
    if config.normalize_weights:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)
    weights = weights * config.scaling_factor
    return sum(_mlp(expert, x) * weights[..., index : index + 1] for index, expert in enumerate(parts["experts"]))


def _frequencies(rope: RopeConfig, head_dim: int):
    """Of each pair of a head, [head_dim / 2]; pairs beyond the fraction stand still."""
    import torch

    index = torch.arange(head_dim // 2, dtype=torch.float32)
    rotated = int(rope.fraction * head_dim // 2)
    return torch.where(index < rotated, rope.theta ** (-2 * index / head_dim), 0.0)


def _views(model, positions, length, state):
    """By kind of attention: cos, sin of the new positions, [seq, head_dim / 2], and what is added to scores, [seq, filled]."""
    import torch

    room = next((tensor.shape[2] for tensor in state if tensor.dim() == 4), None)
    if room is None:
        return {}
    filled = length.item()
    if torch.compiler.is_compiling():  # what is known of the value while a program is traced
        torch._check(filled >= 1)
        torch._check(filled <= room)
    elif filled > room:
        raise ValueError(f"a sequence would have {filled} tokens, and its state has room for {room}")
    distance = positions[:, None] - torch.arange(filled)
    views = {}
    for kind in sorted({kind for kind in model.config.layer_types if kind != "conv"}):
        phase = positions.float()[:, None] * getattr(model, f"{kind}_frequency")
        visible = distance >= 0
        if kind == "sliding_attention":
            visible = visible & (distance < model.config.sliding_window)
        views[kind] = phase.cos(), phase.sin(), torch.where(visible, 0.0, _HIDDEN_SCORE)
    return views


def _rotate(x, cos, sin):
    """Turns the pairs (x[i], x[i + head_dim / 2]) of each head; x is [batch, heads, seq, head_dim]."""
    import torch

    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)
