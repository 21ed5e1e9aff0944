"""llama.cpp's own benchmark on a phone, over adb: tokens a second and temperature, run after run."""

import dataclasses
import json
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from etils import epath

from experiments.results import write_results
from lfm_jax.configuration import ConfigError, mistakes_in
from lfm_jax.interop.export_manifest import check_file
from lfm_jax.training.progress import LoopProgress

_FOLDER = "/data/local/tmp"  # where adb may write and programs may run
_THERMAL = "cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null; true"  # some phones let no program read some of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """gguf, llama_bench: files here. runs: one right after the other. prompt, new_tokens: lengths. threads: of the phone.

    adb: the command. serial: of the phone, where several are connected. dry_run: only show what would be run.
    """

    gguf: str
    llama_bench: str
    runs: int = 20
    prompt: int = 512
    new_tokens: int = 128
    threads: int = 4
    adb: str = "adb"
    serial: str | None = None
    dry_run: bool = False

    def __post_init__(self):
        for field in ("runs", "prompt", "new_tokens", "threads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")


class _Phone:
    """What is asked of adb; nothing is, in a dry run."""

    def __init__(self, config: Config):
        self._command = [config.adb, *(["-s", config.serial] if config.serial else [])]
        self._dry = config.dry_run

    def _run(self, *arguments: str) -> str:
        command = [*self._command, *arguments]
        if self._dry:
            print(shlex.join(command))
            return ""
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-500:]
            raise ConfigError(f"{shlex.join(command)} ended with {done.returncode}: {said}")
        return done.stdout

    def push(self, file: Path) -> None:
        self._run("push", str(file), f"{_FOLDER}/{file.name}")

    def shell(self, command: str) -> str:
        return self._run("shell", command)

    def celsius(self) -> float | None:
        """The warmest of what the phone tells of, which are processors, mostly; None: it tells nothing plausible."""
        values = [int(word) for word in self.shell(_THERMAL).split() if word.lstrip("-").isdigit()]
        plausible = [value / 1000 for value in values if 10_000 < value < 130_000]
        return max(plausible, default=None)


def _files(config: Config) -> list[Path]:
    files = [Path(config.gguf), Path(config.llama_bench)]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file} is no file; gguf names a model, llama_bench the program that was built for the phone.")
    with mistakes_in("gguf"):
        check_file(files[0])
    return [*files, *sorted(files[1].parent.glob("*.so"))]


def _rates(output: str) -> dict[str, float]:
    """Tokens a second of llama-bench's JSON: a list with an entry for the prompt (n_gen 0) and one for what is generated."""
    try:
        entries = json.loads(output)
        rates = {"decode" if entry["n_gen"] else "prefill": float(entry["avg_ts"]) for entry in entries}
        return {name: rates[name] for name in ("prefill", "decode")}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"llama-bench on the phone gave no figures but {output.strip()[-500:]!r}") from error


def main(config: Config, workdir: epath.Path) -> None:
    """Pushes the files, runs the benchmark, and writes every run with the phone's name."""
    if not config.dry_run and shutil.which(config.adb) is None:
        raise ConfigError(f"{config.adb} is not installed; it comes with Android's platform tools (a dry run does without).")
    phone, files = _Phone(config), _files(config)
    for file in files:
        phone.push(file)
    model, program = (shlex.quote(file.name) for file in files[:2])
    settings = f"-p {config.prompt} -n {config.new_tokens} -t {config.threads} -r 1 -o json"
    command = f"cd {_FOLDER} && chmod +x {program} && LD_LIBRARY_PATH=. ./{program} -m {model} {settings}"
    name = phone.shell("getprop ro.product.model").strip()
    if config.dry_run:
        phone.shell(command)
        phone.celsius()
        return
    runs: list[dict[str, Any]] = []
    with LoopProgress("runs", config.runs, 0) as progress:
        for number in range(1, config.runs + 1):
            rates = _rates(phone.shell(command))
            runs.append({**{f"{part}_tokens_per_second": rate for part, rate in rates.items()}, "celsius": phone.celsius()})
            progress.update(number, f"{rates['decode']:.1f} tokens/s, {runs[-1]['celsius']} degrees")
    figures: dict[str, Any] = {"phone": name, "bytes": files[0].stat().st_size}
    for part in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        values = [run[part] for run in runs]
        figures |= {f"{part}_first": values[0], f"{part}_median": statistics.median(values), f"{part}_last": values[-1]}
    write_results(workdir, {**figures, "runs": runs}, config)
