"""The files of a shard: written whole or not at all, and the one that says that a shard is there."""

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from lfm_jax.configuration import ConfigError


def is_made(path: epath.Path, about: Mapping[str, Any]) -> bool:
    """Whether a shard's file of counts, which comes last, is there.

    Raises:
      ConfigError: it is of something else than what `about` says.
    """
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    other = [name for name, value in about.items() if found.get(name) != value]
    if other:
        raise ConfigError(
            f"{path} was made with another {', '.join(other)}: {found.get(other[0])!r}, now {about[other[0]]!r}. Pairs of a run "
            "are by one policy on one list of prompts; take a new workdir."
        )
    return True


def write_lines(path: epath.Path, records: Iterable[Mapping[str, Any] | None]) -> None:
    """JSON lines, whole or not at all; None is left out."""
    part = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    with part.open("w") as file:
        for record in records:
            if record is not None:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    part.replace(path)


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]
