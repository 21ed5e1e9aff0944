"""The vocabulary of shapes, used in signatures and comments everywhere.

batch    sequences in a batch (on the host: this host's; inside jit: the global batch)
seq      positions in a sequence
embed    width of the residual stream
heads    query heads;  kv_heads: key/value heads;  head_dim: width of one head
mlp      width of a feed-forward layer (of one expert in a mixture of experts)
channels channels of the short convolution (equal to embed in every published model)
width    taps of the short convolution
vocab    rows of the embedding: the tokenizer's ids, rounded up
experts  experts of one layer;  top_k: experts that one token uses
capacity slots of a key/value cache
"""

from typing import Annotated

import jax

Tokens = Annotated[jax.Array, "[batch, seq] int32"]
SegmentIds = Annotated[jax.Array, "[batch, seq] int32; documents are numbered from 1 in each row, 0 is padding"]
Positions = Annotated[jax.Array, "[batch, seq] int32; restarts at 0 with each document"]
Hidden = Annotated[jax.Array, "[batch, seq, embed] compute dtype"]
Logits = Annotated[jax.Array, "[batch, seq, vocab] float32"]
Mask = Annotated[jax.Array, "[batch, queries, keys] bool; True where the query may look"]
