"""Each end probed once: a file for each in the workdir, so that what is done is not done again."""

import json
import os
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from experiments.held_out import HeldOut
from experiments.prepared_data import read_tokenized
from experiments.results import write_json
from experiments.scaling_probes import answers, fine_tuned, perturbed
from experiments.scaling_probes.config import Config
from experiments.scaling_probes.ends import Sweep
from experiments.stages import Stage, load_stage, mesh_for, model_functions
from lfm_jax.configuration import ConfigError, to_mapping
from lfm_jax.models import ComputeConfig, ModelConfig
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import MeshConfig

ENDS, _SETTINGS = "ends", "settings.json"
_ROWS = 16


def probe_all(config: Config, sweep: Sweep, workdir: epath.Path) -> list[dict[str, Any]]:
    """What came of each end: `end`, `loss` (nats a token of the held-out text), `probes`, `tuned` and `chances` of answers.

    Raises:
      ConfigError: the workdir holds probes with other settings, or of another run of that name.
    """
    _refuse_other(config, sweep, workdir)
    jax.config.update("jax_compilation_cache_dir", os.fspath(workdir / "programs"))
    first = sweep.settings(sweep.ends[0]["name"])
    seq_len = first.loader.seq_len
    known = fine_tuned.prepare_new_text(workdir, sweep, config.fine_tuning, config.held_out_tokens, seq_len)
    mesh = mesh_for(MeshConfig(), _ROWS)
    found, bench = [], None
    for number, end in enumerate(sweep.ends, 1):
        path = workdir / ENDS / f"{end['name']}.json"
        if not path.exists():
            print(f"{end['name']}: end {number} of {len(sweep.ends)}", flush=True)
            stage = load_stage(os.fspath(sweep.place(end["name"])), ComputeConfig(), mesh)
            if bench is None or bench.model != stage.config:
                bench = _Bench(config, sweep, stage.config, seq_len, mesh)
            record = {"end": end} | bench.probe(stage)
            tuned = [bench.tuned(workdir, end["name"], rate) for rate in config.fine_tuning.rates]
            record["tuned"] = [
                {"rate": rate, "new_loss": new, "new_excess": new - known.log_loss, "forgotten": old - record["loss"]}
                for rate, (new, old) in zip(config.fine_tuning.rates, tuned, strict=True)
            ]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
            fine_tuned.place_of(workdir, end["name"]).rmtree(missing_ok=True)  # its checkpoints are of no further use
            jax.clear_caches()  # of programs that no other end has
        record = json.loads(path.read_text())
        if record["end"] != end:
            raise ConfigError(f"{path} is about another run than the sweep has now; take another --workdir, or delete the file")
        found.append(record)
    return found


def _refuse_other(config: Config, sweep: Sweep, workdir: epath.Path) -> None:
    """What decides the figures of an end stands in a file, and must be the same in every call."""
    settings = to_mapping(config)
    names = ("held_out_tokens", "bits", "noise", "noise_draws", "fine_tuning", "questions", "seed")
    wanted = json.loads(json.dumps({name: settings[name] for name in names} | {"source": to_mapping(sweep.source)}))
    for name in ("samples", "inference_flops"):  # of what is made of the chances
        wanted["questions"].pop(name)
    path = workdir / _SETTINGS
    if not path.exists():
        write_json(path, wanted)
    found = json.loads(path.read_text())
    others = [name for name in wanted if found[name] != wanted[name]]
    if others:
        raise ConfigError(
            f"{workdir} holds probes with other settings: {others[0]} was {found[others[0]]}, is {wanted[others[0]]}; take "
            "another --workdir"
        )


class _Bench:
    """What is made once for all models of one shape."""

    def __init__(self, config: Config, sweep: Sweep, model: ModelConfig, seq_len: int, mesh: Mesh):
        self.model, self._config, self._mesh = model, config, mesh
        text = read_tokenized([os.fspath(sweep.text)])
        self._text = text.held_out[0], text.tokenizer
        self._batches = max(1, config.held_out_tokens // (_ROWS * seq_len))
        self._sweep = sweep
        self._functions = model_functions(model, ComputeConfig())
        rows = seq_len, _ROWS, mesh
        self._held_out = HeldOut(*self._text, self._functions, *rows)
        self._as_file = self._in_file(rows)
        self._deviations = perturbed.initial_deviations(self._functions, config.seed)
        questions = answers.make_questions(config.questions, sweep.source, text.tokenizer.bos_id)
        self._chances = answers.make_chances(self._functions, questions, mesh)

    def _in_file(self, rows: tuple) -> HeldOut | None:
        """The model as a q4_0 file has it; None where its matrices do not divide into the blocks of that, which is said."""
        try:
            functions = model_functions(self.model, ComputeConfig(file_format="q4_0"))
        except ValueError as error:
            print(f"a width of {self.model.embed_dim} is not probed as a q4_0 file: {error}", flush=True)
            return None
        return HeldOut(*self._text, functions, *rows)

    def loss(self, params: Tree, buffers: Tree) -> float:
        """In nats a token, of the sweep's held-out text."""
        return self._held_out.measure(params, buffers, most_batches=self._batches)["nll_per_token"]

    def probe(self, stage: Stage) -> dict[str, Any]:
        """All that needs no training."""
        config, params, buffers = self._config, stage.params, stage.buffers
        before = self.loss(params, buffers)
        found = {}
        for bits in config.bits:
            found[f"rounded to {bits} bits"] = [self.loss(perturbed.to_bits(self._functions, params, bits), buffers)]
        if self._as_file is not None:
            measured = self._as_file.measure(params, buffers, most_batches=self._batches)
            found["q4_0"] = [measured["nll_per_token"]]
        for strength in config.noise:
            draws = [
                self.loss(perturbed.with_noise(params, self._deviations, strength, config.seed + draw), buffers)
                for draw in range(config.noise_draws)
            ]
            found[f"noise {strength:g}"] = draws
        return {
            "loss": before,
            "probes": [
                {"probe": name, "loss": sum(after) / len(after) - before, "draws": [each - before for each in after]}
                for name, after in found.items()
            ],
            "chances": self._chances(params, buffers).tolist(),
        }  # fmt: skip

    def tuned(self, workdir: epath.Path, name: str, rate: float) -> tuple[float, float]:
        """(loss on the new source, loss on the old one) of an end trained on the new source."""
        place, new = fine_tuned.fine_tune(workdir, self._sweep, name, self._config.fine_tuning, rate)
        stage = load_stage(os.fspath(place), ComputeConfig(), self._mesh)
        return new, self.loss(stage.params, stage.buffers)
