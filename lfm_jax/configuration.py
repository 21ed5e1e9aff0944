"""Configurations: nested frozen dataclasses, built from plain mappings with every mistake named where it was made."""

import ast
import contextlib
import dataclasses
import difflib
import functools
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")

_MISSING = dataclasses.MISSING
# Of a value on the command line. Python's parser needs 100 times as much memory as the text, and its stack for each parenthesis.
_MOST_CHARACTERS = 1 << 16
_MOST_SHOWN = 500
REQUIRED = "(required)"


class ConfigError(ValueError):
    """A mistake of the user's, in a configuration, on the command line or in the files that these name.

    The text is all that the user is shown.
    """


@contextlib.contextmanager
def mistakes_in(setting: str) -> Iterator[None]:
    """Around calls that say in a ValueError, or in the absence of a file, what is wrong with what a setting names."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"--config.{setting}: {error}") from error


def nearest(name: str, choices: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """Ends a message about the unknown `name`: the nearest of the valid choices where one is near, and all of them.

    Args:
      name: what was given.
      choices: what would have been valid.
      listed: names to list in place of `choices`, where those are too many to read.

    >>> nearest("learning_rte", ["learning_rate", "steps"])
    "Did you mean 'learning_rate'? Valid choices: learning_rate, steps."
    """
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Valid choices: {', '.join(choices if listed is None else listed)}."


def from_mapping(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Builds the (nested, frozen) dataclass `cls` from a mapping of plain values.

    Understands bool, int, float, str, None, Literal, unions with None, tuples (from any sequence) and nested dataclasses (from a
    mapping). An int is a float where a float is wanted; a bool is neither. Fields with a default may be left out; a mapping for a
    field whose default is a dataclass leaves what it does not name as that default has it.

    Args:
      cls: the dataclass.
      mapping: field names to values, e.g. an `ml_collections.ConfigDict` or the content of a JSON file; a nested dataclass may
        also be there as an instance.

    Raises:
      ConfigError: an unknown field (the nearest is named), a missing one, a value of the wrong type, or a value that the
        dataclass itself refuses; the text starts with the dotted path of the field.
    """
    return _build_dataclass(cls, mapping, "")


def to_mapping(instance: Any) -> dict[str, Any]:
    """The dataclass as nested dicts of JSON-able values: the inverse of `from_mapping` (tuples become lists)."""
    return {field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def with_defaults(cls: type, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping, to be read, with every field that it leaves out: unchecked, and as `REQUIRED` where there is no default."""
    filled = {}
    for field in dataclasses.fields(cls):
        value = _over(_default(field), mapping[field.name]) if field.name in mapping else _default(field)
        kind = _own_types(cls)[field.name]
        inner = next((member for member in (kind, *get_args(kind)) if dataclasses.is_dataclass(member)), None)
        if inner and (_is_mapping(value) or value is _MISSING):
            filled[field.name] = with_defaults(inner, {} if value is _MISSING else value)
        else:
            filled[field.name] = REQUIRED if value is _MISSING else _plain(value)
    return filled


def override(cls: type, mapping: dict[str, Any], path: str, text: str) -> None:
    """Sets the field at the dotted `path` of a mapping meant for `cls`, in place, to what `text` says.

    The field's declared type decides how the text is read, so a field that the mapping leaves to its default, or that is None in
    it, can be set as well. Sequences are written as `1,2,3`.

    Raises:
      ConfigError: there is no such field, or the text is no value for it.
    """
    kinds = field_types(cls)
    if path not in kinds:
        siblings = [known for known in kinds if known.rpartition(".")[0] == path.rpartition(".")[0]]
        outermost = [known for known in kinds if "." not in known]
        raise ConfigError(f"{path}: no such field. {nearest(path, kinds, siblings or outermost)}")
    value = _parse(kinds[path], text, path)
    *parents, last = path.split(".")
    for name in parents:
        if dataclasses.is_dataclass(mapping.get(name)):
            mapping[name] = to_mapping(mapping[name])
        mapping[name] = dict(mapping.get(name) or {})
        mapping = mapping[name]
    mapping[last] = value


def field_types(cls: type) -> dict[str, Any]:
    """The declared type of every field of `cls` and of the dataclasses in it, by dotted path."""
    kinds = {}
    for name, kind in _own_types(cls).items():
        kinds[name] = kind
        for member in (kind, *get_args(kind)):
            if dataclasses.is_dataclass(member) and get_origin(kind) is not tuple:
                kinds.update({f"{name}.{path}": inner for path, inner in field_types(member).items()})
    return kinds


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping from dotted paths to values.

    >>> flatten({"seed": 0, "model": {"depth": 2}})
    {'seed': 0, 'model.depth': 2}
    """
    flat = {}
    for key, value in mapping.items():
        path = _join(prefix, key)
        flat.update(flatten(value, path) if _is_mapping(value) else {path: value})
    return flat


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "keys")  # a ConfigDict is no Mapping


@functools.cache
def _own_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _build_dataclass(cls: type, mapping: Any, path: str) -> Any:
    if isinstance(mapping, cls):
        return mapping
    if not _is_mapping(mapping):
        raise ConfigError(_wrong_type(path, cls, mapping))
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in mapping:
        if name not in fields:
            raise ConfigError(f"{_join(path, name)}: no such field. {nearest(str(name), fields)}")
    hints = _own_types(cls)
    absent = [leaf for name in _required(cls) if name not in mapping for leaf in _leaves(hints[name], _join(path, name))]
    if absent:
        raise ConfigError(f"{', '.join(absent)}: there is no default, so a value must be given.")
    values = {
        name: _build(hints[name], _over(_default(fields[name]), mapping[name]), _join(path, name)) for name in mapping
    }  # fmt: skip
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is _MISSING else field.default_factory()


def _over(default: Any, value: Any) -> Any:
    """What a field is given, over its default: a mapping for a field whose default is a dataclass changes that, and only that."""
    if not (dataclasses.is_dataclass(default) and _is_mapping(value)):
        return value
    given = {name: value[name] for name in value}
    kept = {field.name: getattr(default, field.name) for field in dataclasses.fields(default) if field.init}
    return kept | {name: _over(kept.get(name), inner) for name, inner in given.items()}


def _required(cls: type) -> list[str]:
    """Names of the fields without a default."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    return [field.name for field in fields if field.default is _MISSING and field.default_factory is _MISSING]


def _leaves(kind: Any, path: str) -> list[str]:
    """Which paths must be given to give `path`: those that a dataclass requires, if it does."""
    names = _required(kind) if dataclasses.is_dataclass(kind) else []
    return [leaf for name in names for leaf in _leaves(_own_types(kind)[name], _join(path, name))] or [path]


def _build(kind: Any, value: Any, path: str) -> Any:
    """The value as the type `kind`, or a ConfigError that names `path`."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _build_union(get_args(kind), value, path)
    if origin is Literal:
        return _build_literal(get_args(kind), value, path)
    if origin is tuple:
        return _build_tuple(get_args(kind), value, path)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    if type(value) in (int, float) and not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{path}: expected a number below 1.8e308, got {_shown(value)}.")
    if kind is float and type(value) is int:
        return float(value)
    if kind is type(None) and value is None or isinstance(kind, type) and type(value) is kind:
        return value
    raise ConfigError(_wrong_type(path, kind, value))


def _build_union(members: Sequence[Any], value: Any, path: str) -> Any:
    if value is None and type(None) in members:
        return None
    members = [member for member in members if member is not type(None)]
    if len(members) == 1:  # the usual `X | None`: the error inside X is the one that helps
        return _build(members[0], value, path)
    for exact_first in (True, False):
        for member in members:
            if exact_first == (type(value) is member):
                try:
                    return _build(member, value, path)
                except ConfigError:
                    continue
    raise ConfigError(_wrong_type(path, Union[tuple(members)], value))  # noqa: UP007 (made at run time)


def _build_literal(choices: Sequence[Any], value: Any, path: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    given = value if isinstance(value, str) else _shown(value)
    raise ConfigError(f"{path}: {_shown(value)} is not a valid choice. {nearest(given, map(str, choices))}")


def _build_tuple(members: Sequence[Any], value: Any, path: str) -> tuple:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(_wrong_type(path, tuple[tuple(members)], value))
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise ConfigError(f"{path}: expected {len(members)} values, got {len(value)}: {_shown(value)}.")
    return tuple(_build(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(members, value, strict=True)))


def _parse(kind: Any, text: str, path: str) -> Any:
    """The value that `text` has as the type `kind`: a Python literal, true or false, a plain string, or strings with commas.

    Where a sequence is wanted, one value alone is one of one.
    """
    readings: list[Any] = []
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(f"{path}: a value of {len(text)} characters; at most {_MOST_CHARACTERS} are read.")
    with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, about texts that were not meant to be Python
        readings.append(ast.literal_eval(text))
    readings += [{"true": True, "false": False}.get(text.lower(), text), text, text.split(","), readings[:1]]
    for reading in readings:
        try:
            return _build(kind, reading, path)
        except ConfigError:
            continue
    return _build(kind, readings[0], path)  # raises: the most literal reading gives the clearest message


def _describe(kind: Any) -> str:
    """A type in words for a message."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in get_args(kind))
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if origin is tuple:
        members = get_args(kind)
        several = len(members) == 2 and members[1] is Ellipsis
        return f"a sequence of {_describe(members[0])}" if several else f"({', '.join(map(_describe, members))})"
    if dataclasses.is_dataclass(kind):
        return f"the fields of {kind.__name__} ({', '.join(field.name for field in dataclasses.fields(kind))})"
    names = {bool: "true or false", type(None): "None", int: "a whole number", float: "a number", str: "text"}
    return names[kind] if kind in names else getattr(kind, "__name__", str(kind))


def _wrong_type(path: str, kind: Any, value: Any) -> str:
    where = f"{path}: " if path else ""
    return f"{where}expected {_describe(kind)}, got {_shown(value)} ({type(value).__name__})."


def _shown(value: Any) -> str:
    """A value in a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of more than 4,300 digits
        return "a value that is too long to show"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
