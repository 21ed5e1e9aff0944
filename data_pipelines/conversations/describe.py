"""A row of a batch for people to read, with what is trained marked."""

from collections.abc import Mapping

import numpy as np
from rich.text import Text

from data_pipelines.conversations.examples import symbol_ids
from data_pipelines.tokenization.tokenizer import Tokenizer

TRAINED, GIVEN, SYMBOL, PADDING = "bold green", "dim", "reverse", "dim italic"


def describe_row(row: Mapping[str, np.ndarray], tokenizer: Tokenizer, most: int | None = None) -> Text:
    """The text of a row, its symbols spelled; what is trained is green, each conversation begins on a line of its own.

    Args:
      row: tokens, targets, segment_ids and loss_mask, [seq] each.
      most: positions that are shown; None: all.
    """
    spellings = {index: symbol for symbol, index in symbol_ids(tokenizer).items()}
    tokens, targets, segments, weights = (
        np.asarray(row[name])[:most] for name in ("tokens", "targets", "segment_ids", "loss_mask")
    )
    text = Text()
    changes = np.flatnonzero(np.diff(segments)) + 1
    for here in np.split(np.arange(len(tokens)), changes):
        if not segments[here[0]]:
            text.append(f"[{len(here)} of padding]", PADDING)
            continue
        ids = np.concatenate([tokens[here[:1]], targets[here]])  # the first of all is no target
        trained = np.concatenate([[False], weights[here] > 0])
        is_symbol = np.isin(ids, list(spellings))
        borders = np.flatnonzero((np.diff(trained.astype(int)) != 0) | is_symbol[1:] | is_symbol[:-1]) + 1
        for part in np.split(np.arange(len(ids)), borders):
            style = TRAINED if trained[part[0]] else GIVEN
            if is_symbol[part[0]]:
                text.append(spellings[int(ids[part[0]])], f"{style} {SYMBOL}")
            else:
                text.append(tokenizer.decode(ids[part].tolist()), style)
        text.append("\n")
    return text
