"""Questions whose chance of a right answer is exact: a beginning, and the source's own most probable continuation of it."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines.sources.known_entropy import KnownEntropyConfig, KnownEntropySource
from lfm_jax.models import FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.training.cross_entropy import linear_log_probs
from lfm_jax.training.state import replicated

_TOKENS_A_QUESTION = 64  # of the text that beginnings are looked for in; documents have 16 on average
_BLOCK = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """count: of questions, beginnings of documents that no model has seen. beginning: their symbols. symbols: n, of an answer.

    samples: k for which laws are fitted. inference_flops: budgets of 2 N k for which sizes are compared.
    seed: of the documents; those of 1 and 2 are the sweep's.
    """

    count: int = 512
    beginning: int = 8
    symbols: tuple[int, ...] = (1, 2, 3)
    samples: tuple[int, ...] = (1, 4, 16, 64)
    inference_flops: tuple[float, ...] = (2.5e6, 2e7, 1.6e8)
    seed: int = 3

    def __post_init__(self):
        if self.count < 2:
            raise ValueError(f"count must be at least 2, for the error of a mean, got {self.count}")
        if min(self.beginning, *self.symbols, *self.samples) < 1 or not self.symbols:
            raise ValueError(
                f"beginning, symbols and samples must be at least 1, got {self.beginning}, {self.symbols} and {self.samples}"
            )
        if self.seed in (1, 2):
            raise ValueError(f"seed={self.seed} is that of the sweep's own text; take another")


class Questions(NamedTuple):
    """ids: bos, beginning and right answer, [questions, 1 + beginning + most symbols] int32. beginning: its symbols.

    chances: of the source itself, for each length of the answer from 1 on, [questions, most symbols] float64.
    """

    ids: np.ndarray
    beginning: int
    chances: np.ndarray


def make_questions(config: QuestionsConfig, source: KnownEntropyConfig, bos_id: int) -> Questions:
    """Draws beginnings and continues each, symbol by symbol, by what is most probable after it.

    Raises:
      ValueError: documents of the source may end before the answer does, or too few are long enough.
    """
    most = max(config.symbols)
    if config.beginning + most > source.longest:
        raise ValueError(f"a beginning of {config.beginning} and {most} symbols are more than source.longest={source.longest}")
    known = KnownEntropySource(source)
    documents = known.documents(config.seed, config.count * _TOKENS_A_QUESTION)
    long_enough = (document[: config.beginning] for document in documents if len(document) >= config.beginning)
    beginnings = np.array(list(itertools.islice(long_enough, config.count)))
    if len(beginnings) < config.count:
        raise ValueError(f"only {len(beginnings)} of {config.count} documents have {config.beginning} symbols; ask for fewer")
    rows, chances = [], []
    for document in beginnings:
        found = []
        for _ in range(most):
            following = known.probabilities(document)[-1]
            found.append(following.max() * (1 - source.end))
            document = np.append(document, np.uint8(following.argmax() + source.first_id))
        rows.append([bos_id, *document])
        chances.append(np.cumprod(found))
    return Questions(np.array(rows, np.int32), config.beginning, np.array(chances))


def make_chances(
    functions: FunctionalModel, questions: Questions, mesh: Mesh
) -> Callable[[Tree, Tree], np.ndarray]:
    """(params, buffers) -> the chance of a right answer at temperature 1, of each length, [questions, most symbols] float64."""
    tokens, targets = questions.ids[:, :-1], questions.ids[:, 1:]

    def step(params: Tree, buffers: Tree) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = functions.bind(functions.cast(params), buffers)
            hidden = model(jnp.asarray(tokens)).hidden
            return linear_log_probs(hidden, model.head, jnp.asarray(targets), block=_BLOCK)

    compiled = jax.jit(step, out_shardings=replicated(mesh))
    return lambda params, buffers: np.exp(
        np.cumsum(np.asarray(compiled(params, buffers), np.float64)[:, questions.beginning :], axis=1)
    )
