"""Runs an experiment: the only entry point.

python run.py --list                                      what can be run, a line each
python run.py --describe --config=configs/NAME.py         what it shows, and every field with its value
python run.py --config=configs/NAME.py[:ARGUMENT] --workdir=DIR [--config.FIELD=VALUE ...]
python run.py ... --workdir=gs://BUCKET/NAME --launch=gke|gcloud|skypilot --launch.FIELD=VALUE ...   what runs this on TPU slices

The same command, given again, resumes the run in DIR where it stopped. A workdir holds one run: a command with other settings is
refused, unless --allow_config_change says that the run shall go on with them. With --launch nothing is run: the files are written
and what to type then is said; with --dry_run they are printed (docs/launching.md).
"""

import ast
import contextlib
import difflib
import importlib
import importlib.util
import json
import sys
import traceback
import types
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

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
    flags.DEFINE_string("launch", None, "gke, gcloud or skypilot: write what runs this command there", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "with --launch: print it", flag_values=values)
    return values


def _split_overrides(arguments: list[str], of: str = "config") -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.FIELD=VALUE` (or `--config.FIELD VALUE`) out of the arguments: (the others, [(field, value)])."""
    rest, overrides = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith(f"--{of}."):
            rest.append(argument)
            continue
        path, equals, value = argument.removeprefix(f"--{of}.").partition("=")
        if not equals:
            value = next(waiting, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{of}.{path} needs a value: --{of}.{path}=VALUE.")
        overrides.append((path, value))
    return rest, overrides


def _parse_flags(arguments: list[str]) -> flags.FlagValues:
    values = _define_flags()
    try:
        left_over = values([sys.argv[0], *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        head, dot, tail = error.flagname.partition(".")
        near = difflib.get_close_matches(head, ["config", "launch"] if dot else list(values), n=1, cutoff=0.0 if dot else 0.5)
        hint = f"Did you mean --{near[0]}{dot}{tail}? " if near else ""
        known = ", ".join(f"--{name}" for name in [*values, "config.FIELD", "launch.FIELD"])
        raise ConfigError(f"--{error.flagname}: no such flag. {hint}Valid flags: {known}.") from error
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


def _find_config_file(name: str) -> Path:
    """From the current folder, or else from this file's."""
    path = next((path for path in (Path(name), ROOT / name) if path.is_file()), None)
    if path is None:
        raise ConfigError(f"--config={name}: there is no such file. {nearest(name, _config_files())}")
    return path.resolve()


def _load_config_file(name: str) -> Any:
    path = _find_config_file(name)
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


def _launch(
    scheduler: str, overrides: list[tuple[str, str]], values: flags.FlagValues, command: list[str], experiment: Any
) -> None:
    """Writes or prints what runs `command`, the arguments of this program, on TPU slices.

    experiment: its config.

    Raises:
      ConfigError: a mistake in the settings, or a config file that the container image does not hold.
    """
    from experiments.launch import LaunchConfig, render

    file, colon, argument = values.config.partition(":")
    path = _find_config_file(file)
    if not path.is_relative_to(ROOT):
        raise ConfigError(f"--config={values.config} is not in the container image; put the file into {ROOT.name}/configs/.")
    settings: dict[str, Any] = {}
    try:
        for field, text in overrides:
            override(LaunchConfig, settings, field, text)
        config = from_mapping(LaunchConfig, settings)
    except ConfigError as error:
        raise ConfigError(f"--launch.{error}") from error
    general = [f"--config={path.relative_to(ROOT).as_posix()}{colon}{argument}", f"--workdir={values.workdir}"]
    general += ["--allow_config_change"] * values.allow_config_change
    rendered = render(scheduler, config, values.workdir, [*general, *command], experiment)
    if values.dry_run:
        for name, content in rendered.files.items():
            print(f"# {name}", content, sep="\n")
        print(*(f"# {when}: {what}" for when, what in rendered.commands), sep="\n")
        return
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in rendered.files.items():
        (folder / name).write_text(content)
        print(f"wrote {folder / name}")
    print(f"Nothing runs yet. In {folder}/, type", *(f"  {what}    # {when}" for when, what in rendered.commands), sep="\n")


def _start(module: types.ModuleType, config: Any, record: dict[str, Any], workdir: str, allow_change: bool) -> None:
    """Runs the experiment, together with the other processes of the run where there are any."""
    from etils import epath

    from experiments.results import write_json
    from lfm_jax.host_memory import keep_freed_memory
    from lfm_jax.sharding import distributed, peers
    from lfm_jax.sharding.flags import add_to_environment

    add_to_environment()
    keep_freed_memory()
    process = distributed.join()
    with peers.watch():
        path = epath.Path(workdir)
        _check_workdir(path / "config.json", record, allow_change)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--workdir={path} cannot be made ({error.strerror}): name a folder, new or a run's.") from error
        if process == 0:
            write_json(path / "config.json", record)
        module.main(config, path)


def _run(arguments: list[str]) -> None:
    arguments, overrides = _split_overrides(arguments)
    arguments, launch_overrides = _split_overrides(arguments, "launch")
    values = _parse_flags(arguments)
    if values.help:
        from experiments.launch import describe

        print(__doc__.strip(), describe(), sep="\n\n")
        return
    if values.list:
        _list()
        return
    if values.launch is None and (values.dry_run or launch_overrides):
        given = "--dry_run" if values.dry_run else f"--launch.{launch_overrides[0][0]}"
        raise ConfigError(f"{given} says nothing without --launch: say what for, --launch=gke, gcloud or skypilot.")
    request = _read(values.config, overrides)
    if values.describe:
        _describe(request)
        return
    config = from_mapping(request.module.Config, request.settings)
    if not values.workdir:
        raise ConfigError("--workdir is missing: name the folder for this run's files, e.g. --workdir=workdirs/first.")
    if values.launch is not None:
        command = [f"--config.{path}={text}" for path, text in overrides]
        _launch(values.launch, launch_overrides, values, command, config)
        return
    _start(request.module, config, {**request.about, **to_mapping(config)}, values.workdir, values.allow_config_change)


def main(arguments: list[str]) -> int:
    """Does what the arguments ask for; the exit code is 2 where they hold a mistake, which is then told in one paragraph."""
    try:
        _run(arguments)
    except ConfigError as error:
        with contextlib.suppress(OSError):
            print(f"run.py: {error}", file=sys.stderr)
        return _raised(error, 2)
    return 0


def _raised(error: BaseException, code: int) -> int:
    """Tells the other processes of the run, where there are any, what ends this one; returns the code to leave with."""
    peers = sys.modules.get("lfm_jax.sharding.peers")  # imported where something was run
    return code if peers is None else peers.raised(error, code)


def _process() -> NoReturn:
    """Does it as a process of its own: one of several does not wait for the others once something went wrong."""
    try:
        code = main(sys.argv[1:])
    except SystemExit as leaving:
        code = leaving.code
    except KeyboardInterrupt:  # Python's own way out would wait for the others
        code = 130
    except Exception as error:
        with contextlib.suppress(OSError):  # of a log whose disk is full; the others are told all the same
            traceback.print_exc()
        code = _raised(error, 1)
    distributed = sys.modules.get("lfm_jax.sharding.distributed")
    sys.exit(code) if distributed is None else distributed.leave(code)


if __name__ == "__main__":
    _process()
