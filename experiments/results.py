"""Every experiment ends here: its figures go to `results.json` and `report.html` in the workdir, and to the terminal."""

import importlib.metadata
import json
import math
import os
import platform
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from experiments.report import format_figure, write_report
from lfm_jax.configuration import flatten, to_mapping
from lfm_jax.provenance import commit

FILE = "results.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_results(workdir: epath.PathLike, figures: Mapping[str, Any], config: Any) -> None:
    """Writes `results.json`, the page about the run (`experiments.report`), and prints the figures as a table.

    Of several processes, which all make the call, the first does.

    The file holds the figures under their own names and, beside them, `config`, `seed`, `versions` and `device`: whoever compares
    two runs needs nothing else. Figures have plain names with the unit in them (`seconds`, `bits_per_byte`); lists and mappings
    (samples, tables) are written as they are and left out of the printed table.

    Args:
      workdir: an existing folder.
      figures: names to numbers, strings, booleans, None, or lists and mappings of these; numpy and JAX scalars are accepted.
      config: the experiment's dataclass; `seed` is the value of its first field of that name, at whatever depth.

    Raises:
      ValueError: a figure is called like one of the other entries, or is no finite number: JSON has no NaN, and a figure that
        does not exist is None.
    """
    import jax

    results = {name: _plain(value, name) for name, value in figures.items()}
    settings = to_mapping(config)
    seeds = [value for path, value in flatten(settings).items() if path.rpartition(".")[2] == "seed"]
    about = {"config": settings, "seed": seeds[0] if seeds else None, "versions": versions(), "device": device()}
    taken = sorted(set(results) & set(about))
    if taken:
        raise ValueError(f"figures may not be called {', '.join(taken)}: results.json has entries of that name; rename them")
    if jax.process_index():
        return
    write_json(epath.Path(workdir) / FILE, {**results, **about})
    write_report(workdir)
    _print_table(results, epath.Path(workdir) / FILE)


def read_results(workdir: epath.PathLike) -> dict[str, Any]:
    """The content of `results.json`.

    Raises:
      FileNotFoundError: the run in `workdir` has not ended.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: the run there has not ended; the same command resumes it")
    return json.loads(path.read_text())


def write_json(path: epath.Path, content: Any) -> None:
    """Writes the file whole or not at all, under a name of its own first: a reader never meets half of it."""
    part = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    part.replace(path)


def versions() -> dict[str, str | None]:
    """Versions of Python, of the libraries that decide the numbers, and the commit of this repository (None outside of one)."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found.update({name: importlib.metadata.version(name) for name in _PACKAGES})
    return {**found, "commit": commit()}


def device() -> dict[str, Any]:
    """What the run computed on: platform, kind and number of the JAX devices, and the host's processor cores."""
    import jax

    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices), "host_cores": cores}


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy and JAX scalars and arrays
        return _plain(value.tolist(), name)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the figure {name} is {value}; give a finite number, or None where there is none")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"the figure {name} is a {type(value).__name__}; give a number, a string, None, or lists and dicts of these")


def _print_table(results: Mapping[str, Any], path: epath.Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in results.items():
        if not isinstance(value, dict | list):
            table.add_row(Text(name), Text(format_figure(value, name)))
    console = Console()
    console.print(Text(str(path)), soft_wrap=True)
    console.print(table)
