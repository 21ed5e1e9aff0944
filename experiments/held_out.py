"""What a model makes of text that it has not seen, in figures that compare across tokenizers."""

import itertools
import math

from jax.sharding import Mesh

from data_pipelines import Tokenizer, TokenShards, evaluation_batches
from experiments.prepared_data import prepare_rows
from lfm_jax.models import FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.training import LossConfig, evaluate_loss, host_part, make_eval_step, next_token_objective


class HeldOut:
    """Measures models of one shape on a split.

    Documents longer than `seq_len` are cut into pieces that see nothing of each other, as in training.
    """

    def __init__(
        self, shards: TokenShards, tokenizer: Tokenizer, functions: FunctionalModel, seq_len: int, batch_size: int, mesh: Mesh
    ):
        prepare_rows(shards, seq_len)
        self._step = make_eval_step(functions, next_token_objective(LossConfig()), mesh)
        index, count = host_part(mesh)
        self._batches = evaluation_batches(
            shards, tokenizer, seq_len=seq_len, batch_size=batch_size, process_index=index, process_count=count
        )
        self._bytes_per_token = shards.text_bytes / (shards.tokens + shards.documents)
        self._mesh = mesh

    def measure(self, params: Tree, buffers: Tree, *, most_batches: int | None = None) -> dict[str, float]:
        """nll_per_token (nats), bits_per_byte and tokens (targets), as docs/numbers.md defines them.

        most_batches: stop after as many; bits_per_byte then takes the split's mean bytes of a target.
        """
        batches = itertools.islice(self._batches, most_batches)
        totals = evaluate_loss(self._step, params, buffers, batches, self._mesh)
        return {
            "nll_per_token": totals.nll_per_token,
            "bits_per_byte": totals.nll_per_token / math.log(2) / self._bytes_per_token,
            "tokens": round(totals.targets),
        }
