"""Python's standard library as text: its sources, and its documentation strings as pages."""

import ast
import functools
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests and installed packages; and generated tables of characters, so alike that one held out is known from its neighbours.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
# What this interpreter was built with, and where.
_OF_THE_BUILD = "_sysconfigdata"
_TOPICS = "pydoc_data/topics.py"
# Less documentation than this is a page of headings.
_LEAST_PAGE_CHARACTERS = 256


def standard_library_files() -> list[tuple[str, Path]]:
    """(name relative to the library, path) of every source file, sorted by name; neither tests nor installed packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [(path.relative_to(folder), path) for path in folder.rglob("*.py")]
    return sorted(
        (name.as_posix(), path)
        for name, path in files
        if not _LEFT_OUT & set(name.parts[:-1]) and not name.name.startswith(_OF_THE_BUILD)
    )


def standard_library_texts(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """(suffix of the name, text) of the documents in one file: its source, and a page of its documentation strings.

    pydoc's topics, chapters of the language reference kept as one large dictionary, are a document each instead.
    """
    if name != _TOPICS:
        source = _source(path)
        if source.strip():
            yield "", source
    yield from _documentation(name, path)


def _source(path: Path) -> str:
    return importlib.util.decode_source(path.read_bytes())


@functools.cache  # parsing takes most of the time, and the library is read more than once: for the tokenizer, for the tokens
def _documentation(name: str, path: Path) -> tuple[tuple[str, str], ...]:
    tree = _parse(_source(path))
    if tree is None:
        return ()
    if name == _TOPICS:
        return tuple((f"#{topic}", text) for topic, text in _topics(tree) if text.strip())
    page = _page(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), tree)
    return (("#doc", page),) if len(page) >= _LEAST_PAGE_CHARACTERS else ()


def _parse(source: str) -> ast.Module | None:
    """The syntax tree; None for what this Python does not parse, such as templates and old syntax kept as data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in strings
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The entries of the module's `topics` dictionary, by name."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "topics" for target in node.targets):
            yield from sorted(ast.literal_eval(node.value).items())


def _page(module: str, tree: ast.Module) -> str:
    """Documentation strings under the names and signatures of what they document, much as `pydoc` prints them."""
    entries = list(_entries(tree.body, ""))
    about = ast.get_docstring(tree)
    if not entries and about is None:
        return ""
    return "\n\n".join([f"{module} - {about}" if about else module, *entries]) + "\n"


def _entries(body: list[ast.stmt], indent: str) -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_class = isinstance(node, ast.ClassDef)
        inner = list(_entries(node.body, indent + "    ")) if is_class else []
        documentation = ast.get_docstring(node)
        if documentation:
            inner.insert(0, "\n".join(f"{indent}    {line}" if line else "" for line in documentation.splitlines()))
        if not inner:
            continue
        heading = f"class {node.name}" if is_class else f"{node.name}({ast.unparse(node.args)})"
        yield f"{indent}{heading}\n" + "\n\n".join(inner)
