"""Compilations run in processes of their own: libtpu reads its options once, and a compilation can only be ended from outside."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lfm_jax.sharding import aot

ROOT = Path(__file__).resolve().parents[2]
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu"}  # of JAX_PLATFORMS; with "cuda" alone jax fails an assertion where there is no GPU


def python_path() -> str:
    """PYTHONPATH for a process that imports this repository: its root, and what this process was told."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def run_module(
    module: str, job: dict[str, Any], seconds: float | None = None, environment: dict[str, str] | None = None
) -> Any:
    """Runs `python -m module` with the job as JSON on its standard input; returns its last line of output, read as JSON.

    seconds: that it may take; None: any time. environment: variables beside those that the TPU compiler needs.

    Raises:
      RuntimeError: it failed; the text ends with the reason.
      TimeoutError: it took longer than `seconds`.
    """
    variables = os.environ | aot.ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()} | (environment or {})
    command = [sys.executable, "-m", module]
    try:
        result = subprocess.run(
            command, input=json.dumps(job), env=variables, capture_output=True, text=True, timeout=seconds, cwd=ROOT
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{module} took longer than {seconds:.0f} s") from error
    if result.returncode:
        raise RuntimeError(result.stderr[-4000:])
    lines = result.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None
