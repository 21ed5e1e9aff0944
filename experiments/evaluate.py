"""What a trained model makes of a text: negative log-likelihood and bits per byte."""

import dataclasses

from etils import epath

from data_pipelines import DocumentsConfig, TokenizationConfig
from experiments.held_out import HeldOut
from experiments.prepared_data import prepare_split
from experiments.results import write_results
from experiments.stages import load_stage, mesh_for
from lfm_jax.models import ComputeConfig
from lfm_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: the workdir of a run, or a Hugging Face folder; data: of which the held-out split is measured.

    tokenization: how the text is turned into ids.
    """

    init_from: str
    data: DocumentsConfig
    tokenization: TokenizationConfig = TokenizationConfig()
    seq_len: int = 512
    batch_size: int = 16
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()


def main(config: Config, workdir: epath.Path) -> None:
    """Measures the held-out split of the text with the model's own tokenizer."""
    mesh = mesh_for(config.mesh, config.batch_size)
    stage = load_stage(config.init_from, config.compute, mesh)
    shards = prepare_split(workdir, config.data, "held_out", stage.tokenizer, config.tokenization)
    held_out = HeldOut(shards, stage.tokenizer, stage.functions, config.seq_len, config.batch_size, mesh)
    figures = held_out.measure(stage.params, stage.buffers)
    about = {"documents": shards.documents, "text_bytes": shards.text_bytes, "checkpoint_step": stage.step}
    write_results(workdir, {**figures, **about}, config)
