"""A run whose time is accounted for, from the start of its process, or the end of the run before it there, to its figures."""

from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from experiments.results import write_results
from lfm_jax.configuration import ConfigError
from lfm_jax.training.goodput import Ledger, summary, table, uncounted_seconds


def run_accounted(config: Any, workdir: epath.Path, run: Callable[[Ledger], dict[str, Any]]) -> None:
    """Runs a stage with a ledger for its time, says where that went, and writes it as `goodput` with the stage's figures.

    It is said of a run that is stopped or fails, too, but for a mistake in its settings.
    """
    with Ledger(workdir, writes=jax.process_index() == 0, age=uncounted_seconds()) as ledger:
        try:
            figures = run(ledger)
        except ConfigError:
            raise
        except BaseException:
            print(summary(ledger.seconds()))
            raise
    print(summary(ledger.seconds()))
    write_results(workdir, {**figures, "goodput": table(ledger.seconds())}, config)
