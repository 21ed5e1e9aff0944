"""A trained model behind an API that OpenAI's clients speak: completions and chat, whole or streamed."""

import contextlib
import dataclasses
import importlib.util
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from experiments.api_key import read_key
from experiments.results import write_results
from experiments.serve.chat import read_chat_format
from experiments.serve.requests import Limits
from experiments.serve.runner import Runner
from experiments.stages import load_stage, mesh_for
from lfm_jax.configuration import ConfigError, mistakes_in
from lfm_jax.generation import Engine, EngineConfig, Request, SamplingConfig
from lfm_jax.models import ComputeConfig
from lfm_jax.sharding import MeshConfig

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: the workdir of a run, or a Hugging Face folder. name: of the model, for clients; "": that of the folder.

    host, port: where it listens; port 0 takes a free one. api_key_file: whose first line clients must show; "": nobody must, and
    then only this machine is listened to. A key itself would be written to config.json.
    engine: without context, the model's. limits: of what clients may take.
    """

    init_from: str
    name: str = ""
    host: str = _LOOPBACK[0]
    port: int = 8000
    api_key_file: str = ""
    engine: EngineConfig = EngineConfig(slots=16, prefix_bytes=1 << 28)
    limits: Limits = Limits()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.host not in _LOOPBACK and not self.api_key_file:
            raise ValueError(
                f"host {self.host} may be reached from other machines, so clients need a key: give api_key_file, or host "
                f"{_LOOPBACK[0]}"
            )
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must be in 0..65535, got {self.port}; 0 takes a free one")


def main(config: Config, workdir: epath.Path) -> None:
    """Serves until SIGTERM or SIGINT; then writes how much was answered."""
    if not all(importlib.util.find_spec(package) for package in ("starlette", "uvicorn")):
        raise ConfigError("serving needs starlette and uvicorn: pip install -c constraints.txt -e '.[serve]'.")
    if jax.process_count() > 1:
        raise ConfigError(f"serve runs in one process, not in {jax.process_count()}; start it on one host.")
    from experiments.serve.app import Service
    from experiments.serve.server import address, listen, make_server

    key = read_key(config.api_key_file)
    mesh = mesh_for(config.mesh)
    stage = load_stage(config.init_from, config.compute, mesh)
    with mistakes_in("init_from"):
        chat = read_chat_format(stage.tokenizer, stage.tokenizer_path)
    model = (stage.functions, stage.config, stage.params, stage.buffers)
    engine = Engine(*model, config.engine, decode=chat.decode, mesh=mesh)
    # A model that cannot run is found before anybody is let in.
    engine.run([Request(prompt=(stage.tokenizer.bos_id,), sampling=SamplingConfig(max_new_tokens=1))])
    runner, name = Runner(engine, config.limits.answers), config.name or epath.Path(config.init_from).name or "model"
    service = Service(name, runner, stage.tokenizer, chat, config.limits, context=engine.context, key=key)
    listening, begin = listen(config.host, config.port), time.monotonic()
    print(f"serving {name} at {address(listening)}, {'with' if key else 'without'} a key", flush=True)
    with _signals_return():
        make_server(service).run(sockets=[listening])
    figures: dict[str, Any] = {"seconds": time.monotonic() - begin, "checkpoint_step": stage.step, "answer_tokens": runner.tokens}
    figures["requests_by_status"] = {str(status): count for status, count in sorted(service.answered.items())}
    write_results(workdir, figures, config)


@contextlib.contextmanager
def _signals_return() -> Iterator[None]:
    """uvicorn, having ended by a signal, raises it again; the run has its figures to write yet."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
