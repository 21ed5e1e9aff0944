"""Plans training on a pod without one: compiles the step for the slice, estimates it, and recommends a layout."""

import dataclasses
import itertools
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table

from experiments.pod_plan import tables
from experiments.pod_plan.compilation import Job
from experiments.pod_plan.config import Config, PublishedRun
from experiments.pod_plan.figures import device_count, measure
from experiments.pod_plan.search import Batch, Layout, best, ladder, search, starting_mesh
from experiments.results import write_results
from lfm_jax.models import preset
from lfm_jax.sharding.flags import flags_for

CACHE = "compiled"


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json, pod_plan.md (the tables), pod_plan.png and, where slices or contexts differ, scale.png.

    Compiled programs stay in the workdir, so a run resumes.
    """
    console = Console()
    plans, trials, ladders = [], [], []
    for name in config.presets:
        for topology, seq_len in _shapes(config):
            plan, tried, remedies = _plan(config, workdir, console, name, topology, seq_len)
            plans.append(plan)
            trials += tried
            ladders += remedies
    comparisons = [_compare(config, workdir, console, run) for run in config.published]
    figures = {"plans": plans, "trials": trials, "remedies": ladders, "published": comparisons, "note": tables.NOTE}
    figures |= tables.headline(plans)
    (workdir / "pod_plan.md").write_text(tables.markdown(plans, trials, ladders, comparisons))
    tables.plot([*plans, *comparisons], workdir / "pod_plan.png")
    tables.plot_scale(plans, workdir / "scale.png")
    write_results(workdir, figures, config)
    console.print(tables.NOTE)


def _shapes(config: Config) -> list[tuple[str, int]]:
    """The slices with the contexts that are planned on them."""
    shapes = list(itertools.product(config.topologies, config.seq_lens))
    return shapes + [(topology, seq_len) for topology in config.topologies[-1:] for seq_len in config.seq_lens_on_last]


def _batch(config: Config, topology: str, seq_len: int) -> Batch:
    devices = device_count(topology)
    tokens = config.batch_tokens or config.tokens_per_device * devices
    return Batch(max(1, tokens // seq_len), seq_len, devices)


def _options(config: Config, topology: str) -> tuple[str, ...]:
    """What a launch on such a slice sets, and the config's own."""
    own = dict(option.split("=", 1) for option in config.options)
    return tuple(f"{name}={value}" for name, value in (flags_for(topology.partition(":")[0]) | own).items())


def _plan(config: Config, workdir: epath.Path, console: Console, name: str, topology: str, seq_len: int):
    """(the recommended layout's figures, those of all layouts without their tables, the remedies if none fits)."""
    mesh, compute = config.mesh or starting_mesh(preset(name), topology), config.compute
    first = Layout(mesh, config.accumulation, compute.remat, compute.scan_layers)
    batch = _batch(config, topology, seq_len)

    def attempt(layout: Layout) -> dict[str, Any]:
        job = Job(
            model=preset(name), topology=topology, mesh=layout.mesh, rows=batch.rows, seq_len=seq_len,
            accumulation=layout.accumulation,
            compute=dataclasses.replace(compute, remat=layout.remat, scan_layers=layout.scan_layers),
            optimizer=config.optimizer, loss=config.loss, options=_options(config, topology),
        )  # fmt: skip
        what = f"{name} on {topology}, {batch.rows} x {seq_len:,}, {layout}"
        with console.status(f"compiling {what}"):
            figures = measure(job, workdir / CACHE, config.total_tokens, config.compile_seconds)
        console.print(f"{what}: {tables.in_a_line(figures)}")
        return {"preset": name, **figures}

    tried = search(config, batch, first, attempt)
    chosen, first = best(tried), next(iter(tried))
    about = {"preset": name, "topology": topology, "seq_len": seq_len}
    remedies = [] if chosen else [{**about, **row} for row in ladder(first, tried)]
    plan = tried[chosen or first]
    _print_plan(console, plan, remedies)
    short = [{key: value for key, value in trial.items() if not isinstance(value, list)} for trial in tried.values()]
    return plan, short, remedies


def _compare(config: Config, workdir: epath.Path, console: Console, run: PublishedRun) -> dict[str, Any]:
    job = Job(
        model=run.model, topology=run.topology, devices=run.devices, mesh=run.mesh, rows=run.rows, seq_len=run.seq_len,
        accumulation=run.accumulation, optimizer=config.optimizer, loss=config.loss, options=_options(config, run.topology),
        compute=dataclasses.replace(config.compute, remat=run.remat, scan_layers=run.scan_layers),
    )  # fmt: skip
    with console.status(f"compiling {run.name}"):
        figures = measure(job, workdir / CACHE, config.total_tokens, config.compile_seconds)
    found = figures.get("tokens_per_second_per_chip")
    row = {
        "preset": run.name, "source": run.source, "notes": run.notes, **figures,
        "measured_tokens_per_second_per_chip": run.tokens_per_second,
        "estimate_over_measured": None if found is None else found / run.tokens_per_second,
    }  # fmt: skip
    console.print(f"{run.name}: {tables.in_a_line(row)}; measured {run.tokens_per_second:,.0f} tokens/s a chip")
    return row


def _print_plan(console: Console, plan: dict[str, Any], remedies: list[dict[str, Any]]) -> None:
    table = Table(title=f"{plan['preset']} on {plan['topology']}, context {plan['seq_len']:,}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in tables.plan_lines(plan):
        table.add_row(name, value)
    console.print(table)
    if remedies:
        console.print("Nothing that was tried fits. What saves most:")
        for row in remedies:
            fits = "fits" if row["fits"] else "does not fit either"
            console.print(f"  {row['remedy']}: saves {row['saved_bytes'] / 2**30:.2f} GiB ({fits})")
    elif not plan["fits"]:
        console.print(f"Not planned: {plan['problem']}")
