"""The files that run a command of run.py on TPU slices, and what a person types then."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from experiments.launch.settings import GENERATIONS, LaunchConfig, Slice, as_name, parse_topology, same_size
from lfm_jax.configuration import ConfigError, mistakes_in, nearest

EXIT_MISTAKE, EXIT_INTERRUPTED, EXIT_PEER = 2, 75, 76  # of run.py; a test holds them to where they are defined
_TEMPLATES = Path(__file__).parent / "templates"


class Rendered(NamedTuple):
    """files: contents by name. commands: (when, what to type) in a shell, in the folder of the files."""

    files: dict[str, str]
    commands: list[tuple[str, str]]


class _Job(NamedTuple):
    """What the templates read. command: of the container. environment: of the container. flags: of libtpu, one each."""

    name: str
    command: list[str]
    environment: dict[str, str]
    flags: list[str]
    piece: Slice
    settings: LaunchConfig


def render(
    scheduler: str, settings: LaunchConfig, workdir: str | None, arguments: Sequence[str], config: Any = None
) -> Rendered:
    """Renders for one of `SCHEDULERS`.

    Args:
      workdir: of the run, on gs://.
      arguments: of run.py, as they are to be given in the container.
      config: of the experiment, whose mesh and rows are held against the slices.

    Raises:
      ConfigError: there is no such scheduler, or it cannot run this.
    """
    if scheduler not in SCHEDULERS:
        raise ConfigError(f"--launch={scheduler}: there is no such scheduler. {nearest(scheduler, SCHEDULERS)}")
    if not (workdir or "").startswith("gs://"):
        raise ConfigError(f"--workdir={workdir or ''} does not outlive a machine that is taken away; give a folder on gs://.")
    broken = [argument for argument in arguments if "\n" in argument]
    if broken:
        raise ConfigError(f"{broken[0]!r} has a line break, which not every scheduler hands on; write it into a config.")
    name = settings.name or as_name(workdir.rstrip("/").rpartition("/")[2])
    if not name:
        raise ConfigError(f"--workdir={workdir} does not end on a name for the job; give --launch.name=NAME.")
    _check_fit(config, parse_topology(settings.topology), settings.slices)
    return SCHEDULERS[scheduler](_job(name, settings, workdir, arguments))


def _check_fit(config: Any, piece: Slice, slices: int) -> None:
    """Raises ConfigError for what every process would find out on the slices: see `experiments.stages.mesh_for`, and of a model
    that is described, `check_mesh`.

    Of training on batches alone: others make their rows themselves, or have a mesh of each machine's own.
    """
    if not (hasattr(config, "mesh") and hasattr(config, "loader")):
        return
    from jax.sharding import AbstractMesh

    from experiments.stages import model_functions
    from lfm_jax.sharding import AXES, dealt_order, mesh_sizes, shard_count
    from lfm_jax.sharding.chips import CHIPS
    from lfm_jax.training import check_mesh, check_rows

    devices = piece.chips * CHIPS[piece.generation].devices_per_chip * slices
    with mistakes_in("mesh"):
        mesh = AbstractMesh(tuple(mesh_sizes(config.mesh, devices, slices)), AXES)
        for batch_size, seq_len in config.loader.shapes():
            check_rows(batch_size, config.train.accumulation, mesh)
            dealt_order(seq_len, shard_count("seq", mesh))
        if getattr(config, "model", None) is not None:
            check_mesh(model_functions(config.model, config.compute), mesh)


def _job(name: str, settings: LaunchConfig, workdir: str, arguments: Sequence[str]) -> _Job:
    from lfm_jax.sharding.flags import flags_for  # with it comes jax, which --help does not need

    piece = parse_topology(settings.topology)
    bucket = "/".join(workdir.split("/")[:3])
    environment = {
        "JAX_PLATFORMS": "tpu,cpu",  # a machine whose TPU is not found fails, and does not train on its processor
        "JAX_COMPILATION_CACHE_DIR": settings.compilation_cache or f"{bucket}/compilation_cache",
    }
    flags = [f"--{flag}={value}" for flag, value in flags_for(piece.generation, settings.slices).items()]
    return _Job(name, ["python", "run.py", *arguments], environment, flags, piece, settings)


def _gke(job: _Job) -> Rendered:
    file = f"{job.name}.jobset.yaml"
    return Rendered(
        {file: _filled("gke.yaml", job, gke=GENERATIONS[job.piece.generation].gke, xpk=_xpk(job))},
        [
            ("to start it", f"kubectl apply -f {file}"),
            ("to see what happens", f"kubectl get jobset {job.name} && kubectl logs -f job/{job.name}-slice-0"),
            ("to end it", f"kubectl delete jobset {job.name}"),
        ],
    )


def _xpk(job: _Job) -> list[str]:
    """The same through xpk, which writes its own JobSet, an argument a line; empty where that size means another topology."""
    settings = job.settings
    if job.piece.topology != same_size(job.piece):
        return []
    where = {"cluster": settings.cluster, "project": settings.project, "zone": settings.zone}
    return [
        "xpk workload create",
        *(f"--{name}={shlex.quote(value or name.upper())}" for name, value in where.items()),
        f"--workload={job.name} --tpu-type={job.piece.accelerator_type} --num-slices={settings.slices}",
        f"--docker-image={shlex.quote(settings.image)}",
        *(f"--env={shlex.quote(f'{name}={value}')}" for name, value in job.environment.items()),
        f"--max-restarts={settings.max_restarts} --restart-on-exit-codes={EXIT_INTERRUPTED},{EXIT_PEER}",
        f"--command={shlex.quote(shlex.join(job.command))}",
    ]


def _gcloud(job: _Job) -> Rendered:
    settings = job.settings
    missing = [f"--launch.{name}" for name in ("project", "zone") if getattr(settings, name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: gcloud must be told; there is no default.")
    runtime = _virtual_machine(job, "gcloud")
    startup, create = f"{job.name}.startup.sh", f"{job.name}.create.sh"
    at = f"--project={shlex.quote(settings.project)} --zone={shlex.quote(settings.zone)}"
    node = job.name if settings.slices == 1 else f"{job.name}-0"
    watch = f"gcloud compute tpus tpu-vm ssh {node} {at} --worker=0 --command='journalctl --follow --unit={job.name}'"
    return Rendered(
        {
            startup: _filled("gcloud_startup.sh", job, container=_container(job), registry=_registry(settings.image)),
            create: _filled("gcloud_create.sh", job, at=at, runtime=runtime, startup=startup),
        },
        [
            ("to start it, and again after a preemption", f"bash {create}"),
            ("to see what happens", watch),
            ("to end it, which also stops the bill", f"gcloud compute tpus queued-resources delete {job.name} {at} --force"),
        ],
    )


def _skypilot(job: _Job) -> Rendered:
    settings, runtime = job.settings, _virtual_machine(job, "SkyPilot")
    file = f"{job.name}.sky.yaml"
    infra = f"gcp/*/{settings.zone}" if settings.zone else "gcp"
    more = {"infra": infra, "runtime": runtime, "container": _container(job), "registry": _registry(settings.image)}
    return Rendered(
        {file: _filled("skypilot.yaml", job, **more)},
        [
            ("to start it", f"sky jobs launch {file}"),
            ("to see what happens", f"sky jobs logs --name {job.name}"),
            ("to end it", f"sky jobs cancel --name {job.name}"),
        ],
    )


SCHEDULERS = {"gke": _gke, "gcloud": _gcloud, "skypilot": _skypilot}


def _virtual_machine(job: _Job, scheduler: str) -> str:
    """The image of the TPU's virtual machines."""
    generation, meant = job.piece.generation, same_size(job.piece)
    runtime = GENERATIONS[generation].runtime
    if runtime is None:
        raise ConfigError(f"--launch.topology={job.settings.topology}: {scheduler} has no {generation}; use --launch=gke.")
    if job.piece.topology != meant:
        raise ConfigError(
            f"--launch.topology={job.settings.topology}: {scheduler} asks for {job.piece.accelerator_type}, which is {meant}; "
            f"give --launch.topology={generation}:{meant}, or use --launch=gke."
        )
    return runtime


def _container(job: _Job) -> list[str]:
    """`docker run` on a TPU VM, an argument a line: devices, network and shared memory are the machine's."""
    environment = {**job.environment, "LIBTPU_INIT_ARGS": " ".join(job.flags)}
    return [
        f"docker run --rm --name={job.name} --privileged --network=host --ipc=host",
        *(f"--env={shlex.quote(f'{name}={value}')}" for name, value in environment.items()),
        shlex.quote(job.settings.image),
        *map(shlex.quote, job.command),
    ]


def _registry(image: str) -> str | None:
    """The host of Google's registries, to which the machine's own account is the key; None for others."""
    host = image.partition("/")[0]
    return host if host.endswith(("-docker.pkg.dev", "gcr.io")) else None


def _filled(template: str, job: _Job, **more: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)  # for YAML, of which JSON is a part
    values = {**job._asdict(), "mistake": EXIT_MISTAKE, "interrupted": EXIT_INTERRUPTED, "peer": EXIT_PEER, **more}
    return environment.get_template(template).render(values)
