"""Tables as Markdown."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def markdown_table(columns: Mapping[str, Callable[[Any], str]], rows: Iterable[Any]) -> list[str]:
    """Its lines. columns: titles, and what each makes of a row."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
