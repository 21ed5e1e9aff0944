"""The file that says that a shard is there."""

import json
from collections.abc import Mapping
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
