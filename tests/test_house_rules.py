"""The rules of the house that a machine can hold: imports one way, short files, honest configs, no traces."""

import ast
import collections
import configparser
import functools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import run
from lfm_jax.configuration import field_types, from_mapping

MAY_IMPORT = {
    "lfm_jax": {"lfm_jax"},
    "data_pipelines": {"lfm_jax", "data_pipelines"},
    "experiments": {"lfm_jax", "data_pipelines", "experiments"},
    "configs": {"lfm_jax", "data_pipelines", "experiments", "configs"},
    "run.py": {"lfm_jax", "experiments"},
}
PACKAGES = ("lfm_jax", "data_pipelines", "experiments")
FORBIDDEN_PACKAGES = {"tensorflow", "clu", "ray"}
HEAVY_PACKAGES = {"tensorflow", "torch", "transformers", "tokamax", "matplotlib", "tensorboardX"}
# What reads a file by running it. `re.compile` and the like are methods, and other things.
UNSAFE_PACKAGES = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {
    ("torch", "load"), ("torch.export", "load"), ("yaml", "load"), ("yaml", "full_load"), ("yaml", "unsafe_load"),
}  # fmt: skip
# A program of PyTorch's has no other reader; it may build tensors alone, which is tested with archives that would do more.
OF_TENSORS_ALONE = {("lfm_jax/interop/torch_export.py", "torch.export.load")}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60  # without its docstring
# Kernels that read better in one piece: "path:function".
EXCUSED_FUNCTIONS: set[str] = set()
# Written apart, or this file would break its own rule.
TRACES = ("TO" + "DO", "FIX" + "ME", "/wo" + "rk/", "/tm" + "p/", "/ro" + "ot/", "/ho" + "me/", "/op" + "t/", "file:" + "//")

SOURCES = sorted(
    path
    for folder in (*MAY_IMPORT, "tests")
    for path in ([ROOT / folder] if folder == "run.py" else (ROOT / folder).rglob("*.py"))
)
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    """Top-level names of every package that the file imports, at whatever depth."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: a relative import; write the whole name"
            names.add(node.module.partition(".")[0])
    return names


def functions(path: Path):
    """(where, definition) of every function, methods and nested ones included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name(path)}:{node.name}", node


def length(function: ast.FunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function):
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_imports_run_one_way():
    wrong = []
    for path in SOURCES:
        allowed = MAY_IMPORT.get(name(path).partition("/")[0])
        if allowed is not None:
            wrong += [f"{name(path)} imports {other}" for other in imported(path) & set(MAY_IMPORT) - allowed]
    assert not wrong


def test_nothing_imports_tensorflow_or_what_brings_it():
    assert not [(name(path), package) for path in SOURCES for package in imported(path) & FORBIDDEN_PACKAGES]


def unsafe(module: ast.Module) -> list[str]:
    """What in it could run code that a file brings along."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append("trust_remote_code")
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in UNSAFE_BUILTINS:
            found.append(called.id)
        if isinstance(called, ast.Attribute):
            owner = ast.unparse(called.value)
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            unpickling = owner in ("np", "numpy") and called.attr == "load" and given.get("allow_pickle") is not False
            if (owner, called.attr) in UNSAFE_METHODS or called.attr == "read_pickle" or unpickling:
                found.append(f"{owner}.{called.attr}")
    return found


def test_no_file_is_run():
    """Nothing that is read is unpickled or evaluated, and no library is told that it may."""
    sources = [path for path in SOURCES if name(path).partition("/")[0] in (*PACKAGES, "run.py")]
    assert {(name(path), found) for path in sources for found in unsafe(tree(path))} == OF_TENSORS_ALONE
    assert not [(name(path), package) for path in sources for package in imported(path) & UNSAFE_PACKAGES]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("eval(text)", ["eval"]),
        ("exec(compile(text, 'a', 'exec'))", ["exec", "compile"]),
        ("torch.load(file, weights_only=True)", ["torch.load"]),
        ("torch.export.load(file)", ["torch.export.load"]),
        ("yaml.load(text, Loader)", ["yaml.load"]),
        ("np.load(file)", ["np.load"]),
        ("numpy.load(file, allow_pickle=True)", ["numpy.load"]),
        ("AutoModel.from_pretrained(name, trust_remote_code=False)", ["trust_remote_code"]),
        ("np.load(file, mmap_mode='r', allow_pickle=False); re.compile('a'); json.load(file); yaml.safe_load(text)", []),
    ],
)
def test_what_runs_a_file_is_found(code, found):
    assert unsafe(ast.parse(code)) == found


def test_files_are_read_in_one_sitting():
    lengths = {name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES}


def test_functions_are_short():
    found = {where: length(function) for path in SOURCES for where, function in functions(path)}
    long = {where: lines for where, lines in found.items() if lines > MAX_FUNCTION_LINES}
    assert {where: lines for where, lines in long.items() if where not in EXCUSED_FUNCTIONS} == {}
    assert EXCUSED_FUNCTIONS <= set(long), "an excused function is short now, or gone: take it off the list"


def test_no_drawers():
    assert not [name(path) for path in SOURCES if path.stem in ("utils", "util", "common", "helpers", "misc")]


def test_test_files_have_names_of_their_own():
    names = collections.Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert not [file for file, count in names.items() if count > 1]


def test_tests_mirror_the_folders():
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        homes = [ROOT / folder, ROOT / "lfm_jax" / folder]
        assert any(home.is_dir() for home in homes), f"{name(path)}: no folder {folder} in the tree or in lfm_jax"


def test_public_names_have_docstrings():
    missing = []
    for path in SOURCES:
        if name(path).startswith("tests/"):
            continue
        missing += [name(path)] * (ast.get_docstring(tree(path)) is None)
        for node in tree(path).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                missing.append(f"{name(path)}:{node.name}")
    assert not missing


def test_no_traces_of_a_machine_and_nothing_left_for_later():
    texts = [path for path in ROOT.iterdir() if path.suffix in (".md", ".cfg", ".toml", ".txt")]
    texts += [ROOT / ".ci" / "run", *SOURCES, *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.html")]
    found = [
        f"{name(path)}:{number}: {trace}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for trace in TRACES
        if trace in line
    ]
    assert not found


def test_ruff_is_content():
    checked = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", ROOT], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_importing_changes_nothing():
    """Every module is imported, in a process where a touched device is an error."""
    modules = [name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in SOURCES]
    modules = [module for module in modules if module.partition(".")[0] in PACKAGES]
    code = (
        "import importlib, os, sys, jax; before = dict(os.environ)  # jax itself prepares for TPUs\n"
        f"for module in {modules!r}: importlib.import_module(module)\n"
        "assert dict(os.environ) == before, 'an import changed the environment'\n"
        f"heavy = {HEAVY_PACKAGES!r} & set(sys.modules)\n"
        "assert not heavy, f'imported with the package: {heavy}'"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    imports = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert imports.returncode == 0, imports.stderr


def commands(path: Path) -> list[list[str]]:
    """The commands in a config's docstring, each as the arguments of run.py."""
    docstring = (ast.get_docstring(tree(path)) or "").replace("\\\n", " ")
    return [shlex.split(line)[2:] for line in docstring.splitlines() if line.strip().startswith("python run.py")]


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_config_is_an_experiment_card(path):
    """It says what it shows and by which command, and run.py understands that command."""
    (definition,) = (node for node in tree(path).body if isinstance(node, ast.FunctionDef) and node.name == "get_config")
    assert ast.get_docstring(definition)
    assert any(argument.partition(":")[0] == f"--config={name(path)}" for command in commands(path) for argument in command)
    for command in commands(path):
        arguments, overrides = run._split_overrides(command)
        values = run._parse_flags(arguments)
        assert values.workdir
        request = run._read(values.config, overrides)
        assert from_mapping(request.module.Config, request.settings)
        assert callable(request.module.main)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_config_refuses_an_argument_it_does_not_know(path):
    with pytest.raises(ValueError, match="no_such_argument"):
        runpy.run_path(str(path))["get_config"]("no_such_argument")


def config_fields() -> dict[str, str]:
    """Name of every field of every experiment's configuration: where it is."""
    fields = {}
    for path in CONFIGS:
        for command in commands(path):
            arguments, overrides = run._split_overrides(command)
            request = run._read(run._parse_flags(arguments).config, overrides)
            fields |= {field.rpartition(".")[2]: f"{name(path)}: {field}" for field in field_types(request.module.Config)}
    return fields


def read_names() -> set[str]:
    """Every attribute that code outside the configs and the validation reads, by its name or through getattr."""
    names = set()
    for path in SOURCES:
        if name(path).startswith(("tests/", "configs/")):
            continue
        nodes = list(ast.walk(tree(path)))
        validation = {
            id(node) for where, function in functions(path) if function.name == "__post_init__" for node in ast.walk(function)
        }
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and id(node) not in validation}
        if any(isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" for node in nodes):
            names |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return names


def test_every_config_field_is_read():
    unread = config_fields().keys() - read_names()
    assert not [config_fields()[field] for field in unread]


@functools.cache
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements() -> dict[str, list[str]]:
    """Requirements by extra; "" has those of the package itself."""
    lines = {"": setup()["options"]["install_requires"], **setup()["options.extras_require"]}
    return {extra: [line for line in text.splitlines() if line and not line.startswith("#")] for extra, text in lines.items()}


def canonical(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_everything_required_is_pinned_and_every_pin_is_a_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; python_version .*)?", line) for line in lines)
    pinned = {canonical(line) for line in lines}
    assert not {canonical(line) for wanted in requirements().values() for line in wanted} - pinned


def test_what_is_imported_is_required():
    """A package that the code imports is in setup.cfg: in the base, or in the extra whose tools the code needs."""
    called = {"absl-py": "absl", "pytest-xdist": "xdist", "pyyaml": "yaml", "tensorflow-datasets": "tensorflow_datasets"}
    known = {
        called.get(canonical(line), canonical(line).replace("-", "_")) for lines in requirements().values() for line in lines
    }
    known |= {"orbax", "tensorboardX", *sys.stdlib_module_names, *MAY_IMPORT, "run"}
    known |= {path.stem for path in SOURCES if path.is_relative_to(ROOT / "tests")}
    unknown = {(name(path), package) for path in SOURCES for package in imported(path) - known}
    assert not unknown


def test_the_readme_has_the_two_commands():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv")]
    install = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[{}]' && .venv/bin/{}"
    quickstart = "python run.py --config=configs/quickstart.py --workdir=workdirs/quickstart"
    assert lines == [install.format("export", quickstart), install.format("test", "pytest")]
