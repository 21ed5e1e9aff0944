"""Files of a JSON object a line, in a run's workdir."""

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath


def write_lines(path: epath.Path, records: Iterable[Mapping[str, Any] | None]) -> None:
    """Whole or not at all; what was there is replaced. A record that is None is left out."""
    part = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    with part.open("w") as file:
        for record in records:
            if record is not None:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    part.replace(path)


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]
