"""Probes of a sweep's ends: what rounding, noise and a new source cost a model, and how often it answers, by its tokens."""

import time
from typing import Any

import jax
from etils import epath

from data_pipelines import load_tokenizer
from experiments.json_lines import write_lines
from experiments.results import write_results
from experiments.scaling_probes import answers, fits, report
from experiments.scaling_probes.config import Config
from experiments.scaling_probes.ends import Sweep, read_sweep
from experiments.scaling_probes.probing import probe_all
from experiments.stages import TOKENIZER
from lfm_jax.configuration import ConfigError
from lfm_jax.scaling.train_to_test import task_loss

PROBES = "probes.jsonl"


def main(config: Config, workdir: epath.Path) -> None:
    """Probes the ends that are done, and writes probes.jsonl, scaling_probes.md, scaling_probes.png and results.json.

    Raises:
      ConfigError: there is no sweep, none of its ends is done, or the workdir holds other probes.
    """
    begin = time.monotonic()
    if jax.process_count() > 1:
        raise ConfigError("the probes are for one machine; run them as one process, of a slice with one host")
    sweep = read_sweep(config.sweep)
    records = probe_all(config, sweep, workdir)
    figures = _figures(config, sweep, records)
    write_lines(workdir / PROBES, figures["probes"])
    text = report.markdown(figures)
    (workdir / "scaling_probes.md").write_text(text)
    report.plot(figures, workdir / "scaling_probes.png")
    print(text)
    write_results(workdir, figures | {"seconds": time.monotonic() - begin}, config)


def _figures(config: Config, sweep: Sweep, records: list[dict[str, Any]]) -> dict[str, Any]:
    rows, new = fits.probe_rows(records), fits.new_rows(records)
    drawn = config.resamples, config.seed
    laws = fits.answer_laws(records, config.questions, config.seed)
    questions = answers.make_questions(config.questions, sweep.source, load_tokenizer(sweep.text / TOKENIZER).bos_id)
    return {
        "ends_probed": len(records), "missing": sweep.missing,
        "kumar": fits.kumar(rows, config.bits, *drawn),
        "exponents": fits.exponents(rows, *drawn), "exponents_of_new_source": fits.exponents(new, *drawn),
        "over_multipliers": fits.over_multipliers([*rows, *new]),
        "own_task_loss": {str(n): task_loss(questions.chances[:, n - 1], 1) for n in config.questions.symbols},
        "answer_laws": laws, "best_budgets": fits.best_budgets(records, laws, sweep.budgets, config.questions),
        "answer_curves": fits.answer_curves(records, config.questions), "probes": rows, "new_source": new,
    }  # fmt: skip
