"""Runs an experiment: the only entry point.

python run.py --list                                      what can be run, a line each
python run.py --describe --config=configs/NAME.py         what it shows, and every field with its value
python run.py --config=configs/NAME.py[:ARGUMENT] --workdir=DIR [--config.FIELD=VALUE ...]

The same command, given again, resumes the run in DIR where it stopped. A workdir holds one run: a command with other settings is
refused, unless --allow_config_change says that the run shall go on with them.
"""

import ast
import difflib
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from lfm_jax.configuration import ConfigError, flatten, from_mapping, nearest, override, to_mapping, with_defaults

ROOT = Path(__file__).resolve().parent


class Request(NamedTuple):
    """What a command line asks for.

    module: the experiment, with `Config` and `main`. settings: for `Config`, overrides in them, not checked yet.
    values: every field by dotted path, to be read. about: the experiment's name and how it was asked for, for config.json.
    docstring: of the config file.
    """

    module: types.ModuleType
    settings: dict[str, Any]
    values: dict[str, Any]
    about: dict[str, Any]
    docstring: str


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_bool("list", False, "list what can be run", flag_values=values)
    flags.DEFINE_bool("describe", False, "show the experiment's card and every field", flag_values=values)
    flags.DEFINE_bool("help", False, "show this text", flag_values=values)
    flags.DEFINE_string("config", None, "configs/NAME.py[:ARGUMENT]", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_bool("allow_config_change", False, "go on in a workdir with other settings", flag_values=values)
    return values


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.FIELD=VALUE` (or `--config.FIELD VALUE`) out of the arguments: (the others, [(field, value)])."""
    rest, overrides = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        path, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(waiting, "--")
            if value.startswith("--"):
                raise ConfigError(f"--config.{path} needs a value: --config.{path}=VALUE.")
        overrides.append((path, value))
    return rest, overrides


def _parse_flags(arguments: list[str]) -> flags.FlagValues:
    values = _define_flags()
    try:
        left_over = values([sys.argv[0], *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        head, dot, tail = error.flagname.partition(".")
        near = difflib.get_close_matches(head, list(values), n=1, cutoff=0.5)
        hint = f"Did you mean --{'config' if dot else near[0]}{dot}{tail}? " if near or dot else ""
        known = ", ".join(f"--{name}" for name in values)
        raise ConfigError(f"--{error.flagname}: no such flag. {hint}Valid flags: {known}, --config.FIELD.") from error
    except flags.Error as error:
        raise ConfigError(f"{error}. Flags are written --name=value, or --name for yes.") from error
    if left_over:
        raise ConfigError(f"{left_over[0]!r} stands alone: flags are written --name=value; did you mean --config={left_over[0]}?")
    return values


def _config_files() -> dict[str, Path]:
    """Every config by the name it is asked for."""
    return {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "configs").rglob("[!_]*.py"))}


def _list() -> None:
    """Prints each config with the first line of its docstring; reads the files without running them."""
    files = _config_files()
    for name, path in files.items():
        lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        print(f"{name:{max(map(len, files))}}  {lines[0] if lines else ''}")


def _load_config_file(name: str) -> Any:
    path = next((path for path in (Path(name), ROOT / name) if path.is_file()), None)
    if path is None:
        raise ConfigError(f"--config={name}: there is no such file. {nearest(name, _config_files())}")
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={name}: not a Python file. {nearest(name, _config_files())}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(name: str | None, overrides: list[tuple[str, str]]) -> Request:
    """Reads the config file and applies the overrides.

    Raises:
      ConfigError: a mistake in the name, the argument, a field's name or a value.
    """
    if not name:
        raise ConfigError(f"--config is missing: say what to run. {nearest('', _config_files())}")
    file, _, argument = name.partition(":")
    module = _load_config_file(file)
    try:
        settings = json.loads(json.dumps(module.get_config(argument).to_dict(), default=to_mapping))
    except ValueError as error:
        raise ConfigError(f"--config={name}: {error}") from error
    experiment = settings.pop("experiment")
    experiment_module = importlib.import_module(f"experiments.{experiment}")
    preset = flatten(with_defaults(experiment_module.Config, settings))
    for path, text in overrides:
        try:
            override(experiment_module.Config, settings, path, text)
        except ConfigError as error:
            raise ConfigError(f"--config.{error}") from error
    values = flatten(with_defaults(experiment_module.Config, settings))
    differences = {path: preset.get(path) for path, _ in overrides if path in values and preset.get(path) != values[path]}
    about = {"experiment": experiment, "invocation": {"config": name, "preset_values": differences}}
    return Request(experiment_module, settings, values, about, module.__doc__ or "")


def _describe(request: Request) -> None:
    print(request.docstring.strip(), end="\n\n")
    for path, value in request.values.items():
        print(f"--config.{path}={','.join(map(str, value)) if isinstance(value, list) else value}")


def _check_workdir(path: Any, record: dict[str, Any], allow_change: bool) -> None:
    """Refuses to mix two runs in one folder.

    Raises:
      ConfigError: config.json in the workdir is of another experiment or has other settings.
    """
    if not path.exists():
        return
    earlier = json.loads(path.read_text())
    if earlier["experiment"] != record["experiment"]:
        raise ConfigError(
            f"{path.parent} holds a run of the experiment {earlier['experiment']!r}, this is {record['experiment']!r}; "
            "give another --workdir."
        )
    old, new = (flatten({key: value for key, value in record.items() if key != "invocation"}) for record in (earlier, record))
    differences = [f"{name} was {old.get(name)}, is {new.get(name)}" for name in {**old, **new} if old.get(name) != new.get(name)]
    if differences and not allow_change:
        raise ConfigError(
            f"{path.parent} holds a run with other settings: {'; '.join(differences)}. Give another --workdir to start anew, the "
            "same settings to resume, or --allow_config_change to go on in this folder with the new ones."
        )
    if differences:
        print(f"config changed in {path.parent}: {'; '.join(differences)}", flush=True)


def _run(arguments: list[str]) -> None:
    arguments, overrides = _split_overrides(arguments)
    values = _parse_flags(arguments)
    if values.help:
        print(__doc__.strip())
        return
    if values.list:
        _list()
        return
    request = _read(values.config, overrides)
    if values.describe:
        _describe(request)
        return
    config = from_mapping(request.module.Config, request.settings)
    record = {**request.about, **to_mapping(config)}
    if not values.workdir:
        raise ConfigError("--workdir is missing: name the folder for this run's files, e.g. --workdir=workdirs/first.")
    from etils import epath

    from experiments.results import write_json

    workdir = epath.Path(values.workdir)
    _check_workdir(workdir / "config.json", record, values.allow_config_change)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be made ({error.strerror}): name a folder, new or a run's.") from error
    write_json(workdir / "config.json", record)
    request.module.main(config, workdir)


def main(arguments: list[str]) -> int:
    """Does what the arguments ask for; the exit code is 2 where they hold a mistake, which is then told in one paragraph."""
    try:
        _run(arguments)
    except ConfigError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
