"""A run whose time is accounted for, from the start of its process to its figures."""

from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from experiments.results import write_results
from lfm_jax.training.goodput import Ledger, process_age, summary, table


def run_accounted(config: Any, workdir: epath.Path, run: Callable[[Ledger], dict[str, Any]]) -> None:
    """Runs a stage with a ledger for its time, says where that went, and writes it as `goodput` with the stage's figures."""
    with Ledger(workdir, writes=jax.process_index() == 0, age=process_age()) as ledger:
        figures = run(ledger)
    print(summary(ledger.seconds()))
    write_results(workdir, {**figures, "goodput": table(ledger.seconds())}, config)
