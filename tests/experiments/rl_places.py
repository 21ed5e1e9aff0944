"""What tests of RL share: a tiny model, turns that end, and a run that finds its environments on one device."""

import contextlib

import jax
import numpy as np
import pytest

from data_pipelines import Document, TokenizerConfig, train_tokenizer
from data_pipelines.conversations import Conversation
from data_pipelines.tasks import registry
from experiments import rl
from experiments.answering import Answerer
from experiments.rl import environments, sampler
from lfm_jax.interop import export_folder
from lfm_jax.models import Decoder, functional
from lfm_jax.sharding import make_mesh


class OftenDone(Answerer):
    """Every second symbol ends a turn, or a model with random weights would hardly end one."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        said = self.encoder.prompts([Conversation([{"role": "assistant", "content": "a"}])])[0].tolist()
        self.stop_ids = tuple({*self.stop_ids, *(token for token in range(15, 330, 2) if token not in said)})


def write_model(config, folder):
    """A model with random weights, in folder/model."""
    text = "What is 3 + 4? Answer: 7\nSo did the cat. " * 50
    train_tokenizer(TokenizerConfig(vocab_size=330), [Document(text, "a")], folder / "tokenizer")
    functions, rng = functional(lambda rngs: Decoder(config, rngs=rngs)), np.random.default_rng(0)
    draw = lambda leaf: (rng.normal(0, 0.1, leaf.shape) + (len(leaf.shape) == 1)).astype(np.float32)
    params, buffers = jax.tree.map(draw, functions.abstract_params), jax.tree.map(draw, functions.abstract_buffers)
    export_folder(config, params, buffers, folder / "model", tokenizer=folder / "tokenizer")


@contextlib.contextmanager
def places(echo, *tasks):
    """Environments are found by their names, turns end, and there is one device, which compiles in a third of the time.

    echo: an environment of several turns. tasks: others.
    """
    with pytest.MonkeyPatch.context() as patch:
        for task in tasks:
            patch.setitem(registry.TASKS, task.name, task)
        own = environments.source_named
        made = lambda name, turns: environments.Source("echo", 1, echo, None) if name == "echo" else own(name, turns)
        patch.setattr(rl, "source_named", made)
        patch.setattr(rl, "mesh_for", lambda config, *rest: make_mesh(config, jax.devices()[:1]))
        patch.setattr(sampler, "Answerer", OftenDone)
        yield patch
