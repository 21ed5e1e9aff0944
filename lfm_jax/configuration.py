"""Configurations: nested frozen dataclasses, built from plain mappings with every mistake named where it was made."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")

_MISSING = dataclasses.MISSING


class ConfigError(ValueError):
    """A mistake of the user's in a configuration or on the command line; the text is all that the user is shown."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Ends a message about the unknown `name`: the nearest valid choice where one is near, and all of them.

    >>> nearest("lr", ["learning_rate", "steps"])
    'Valid choices: learning_rate, steps.'
    """
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    listed = f"Valid choices: {', '.join(choices)}." if choices else "There is nothing to choose from."
    return f"Did you mean {near[0]!r}? {listed}" if near else listed


def from_mapping(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Builds the (nested, frozen) dataclass `cls` from a mapping of plain values.

    Understands bool, int, float, str, None, Literal, unions with None, tuples (from any sequence) and nested dataclasses (from a
    mapping). An int is a float where a float is wanted; a bool is neither. Fields with a default may be left out.

    Args:
      cls: the dataclass.
      mapping: field names to values, e.g. an `ml_collections.ConfigDict` or the content of a JSON file.

    Raises:
      ConfigError: an unknown field (the nearest is named), a missing one, a value of the wrong type, or a value that the
        dataclass itself refuses; the text starts with the dotted path of the field.
    """
    return _build_dataclass(cls, mapping, "")


def to_mapping(instance: Any) -> dict[str, Any]:
    """The dataclass as nested dicts of JSON-able values: the inverse of `from_mapping` (tuples become lists)."""
    return {field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping from dotted paths to values.

    >>> flatten({"seed": 0, "model": {"depth": 2}})
    {'seed': 0, 'model.depth': 2}
    """
    flat = {}
    for key, value in mapping.items():
        path = _join(prefix, key)
        flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build_dataclass(cls: type, mapping: Any, path: str) -> Any:
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping):
        raise ConfigError(_wrong_type(path, cls, mapping))
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in mapping:
        if name not in fields:
            raise ConfigError(f"{_join(path, name)}: no such field. {nearest(name, fields)}")
    required = [name for name, field in fields.items() if field.default is _MISSING and field.default_factory is _MISSING]
    absent = [_join(path, name) for name in required if name not in mapping]
    if absent:
        raise ConfigError(f"{', '.join(absent)}: no value was given and there is no default; set it in the config file.")
    hints = _field_types(cls)
    values = {name: _build(hints[name], mapping[name], _join(path, name)) for name in mapping}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error


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
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
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
    raise ConfigError(f"{path}: {value!r} is not a valid choice. {nearest(str(value), map(str, choices))}")


def _build_tuple(members: Sequence[Any], value: Any, path: str) -> tuple:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(_wrong_type(path, tuple[tuple(members)], value))
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise ConfigError(f"{path}: expected {len(members)} values, got {len(value)}: {value!r}.")
    return tuple(_build(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(members, value, strict=True)))


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
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _wrong_type(path: str, kind: Any, value: Any) -> str:
    where = f"{path}: " if path else ""
    return f"{where}expected {_describe(kind)}, got {value!r} ({type(value).__name__})."
