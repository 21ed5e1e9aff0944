"""Compiles the real training step for a slice that is not there, in a process of its own, once: the program is kept on disk."""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import zstandard
from etils import epath

from experiments.benchmarks.processes import ROOT, run_module
from experiments.results import write_json
from lfm_jax.configuration import from_mapping, to_mapping
from lfm_jax.models import ComputeConfig, ModelConfig
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import LossConfig, OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training step to compile.

    topology: as the TPU compiler knows it; devices: how many of them, the first ones, None for all.
    rows, seq_len: of the whole batch; accumulation: micro-batches it is taken in.
    options: of the compiler, NAME=VALUE each.
    """

    model: ModelConfig
    topology: str
    devices: int | None = None
    mesh: MeshConfig
    rows: int
    seq_len: int
    accumulation: int = 1
    compute: ComputeConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of a job.

    problem: why there is no program, None if there is one. needed_bytes: HBM that a program which does not fit would take.
    memory: bytes a device by what they are for. coordinates: of each device's chip. text: the program.
    """

    problem: str | None
    needed_bytes: float | None
    memory: dict[str, float]
    coordinates: tuple[tuple[int, ...], ...]
    seconds: float
    text: str | None

    @property
    def peak_bytes(self) -> float | None:
        """Arguments, results that share no memory with them, temporaries, and the program's own code."""
        return sum(self.memory.values()) if self.memory else self.needed_bytes


def compile_step(job: Job, folder: epath.Path, seconds: float) -> Compiled:
    """The program, from the folder if the same job was compiled before by the same code and compiler.

    A job that took longer than `seconds` is tried again the next time; what the compiler refused is not.
    """
    key = fingerprint(job)
    record, program = folder / f"{key}.json", folder / f"{key}.hlo.zst"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        try:
            found = run_module(__name__, {"job": to_mapping(job), "program": str(program)}, seconds)
        except TimeoutError:
            return Compiled(f"not compiled in {seconds:.0f} s", None, {}, (), seconds, None)
        except RuntimeError as error:
            return Compiled(f"failed: {_last_line(str(error))}", None, {}, (), time.monotonic() - begin, None)
        write_json(record, {**found, "seconds": time.monotonic() - begin, "job": to_mapping(job)})
    found = json.loads(record.read_text())
    text = None
    if found["problem"] is None:
        text = zstandard.ZstdDecompressor().decompress(program.read_bytes()).decode()
    coordinates = tuple(tuple(each) for each in found["coordinates"])
    return Compiled(found["problem"], found["needed_bytes"], found["memory"], coordinates, found["seconds"], text)


def fingerprint(job: Job) -> str:
    """Changes with the job, with any source file of the library, and with the versions that decide the program."""
    digest = hashlib.sha256(json.dumps(to_mapping(job), sort_keys=True).encode())
    for path in sorted((ROOT / "lfm_jax").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    for package in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:24]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("  ", "For simplicity", "---"))]
    return lines[-1][:400] if lines else "no message"


def parse_needed_bytes(message: str) -> float | None:
    """Bytes of HBM that a program would need, from the compiler's refusal of it."""
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern in (r"Used ([\d.]+)([KMGT]?) of", r"total memory required[^(]*\(([\d.]+)([KMGT]?)\)"):
        found = re.search(pattern, message)
        if found:
            return float(found[1]) * unit[found[2]]
    return None


def _memory(compiled: Any) -> dict[str, float]:
    stats = compiled.memory_analysis()
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "result_bytes": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporary_bytes": stats.temp_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
    }


def _lowered(job: Job):
    """(the lowered step, coordinates of the mesh's devices)."""
    import jax
    import jax.numpy as jnp

    from lfm_jax.models import Decoder, functional
    from lfm_jax.sharding import activation_sharding, aot, make_mesh
    from lfm_jax.training import abstract_state, make_optimizer, make_train_step, next_token_objective

    mesh = make_mesh(job.mesh, aot.tpu_devices(job.topology)[: job.devices])
    functions = functional(lambda rngs: Decoder(job.model, job.compute, rngs=rngs))
    optimizer = make_optimizer(job.optimizer, 10**6)
    step = make_train_step(functions, optimizer, next_token_objective(job.loss), mesh, seed=0, accumulation=job.accumulation)
    sharding = activation_sharding(mesh, ("batch", "seq"))
    array = lambda dtype: jax.ShapeDtypeStruct((job.rows, job.seq_len), dtype, sharding=sharding)
    batch = {name: array(jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    batch["loss_mask"] = array(jnp.float32)
    coordinates = [[int(each) for each in device.coords] for device in mesh.devices.flat]
    return step.trace(abstract_state(functions, optimizer, mesh), batch).lower(lowering_platforms=("tpu",)), coordinates


def _work(job: Job, program: Path) -> dict[str, Any]:
    import jax

    result = {"problem": None, "needed_bytes": None, "memory": {}, "coordinates": []}
    try:
        lowered, coordinates = _lowered(job)
    except ValueError as error:  # the mesh, the rows or the topology do not fit one another
        return result | {"problem": f"refused: {error}"}
    options = dict(option.split("=", 1) for option in job.options)
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {"problem": "does not fit", "needed_bytes": parse_needed_bytes(str(error))}
    program.write_bytes(zstandard.ZstdCompressor(level=9).compress(compiled.as_text().encode()))
    return result | {"memory": _memory(compiled), "coordinates": coordinates}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    received = json.load(sys.stdin)
    print(json.dumps(_work(from_mapping(Job, received["job"]), Path(received["program"]))))
