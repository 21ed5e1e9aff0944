"""Conversations made ready for a model: read, split, and encoded by its tokenizer and chat format."""

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from data_pipelines import Quarantine, Tokenizer
from data_pipelines.conversations import (
    CHAT_FORMATS,
    ChatFormat,
    ConversationsConfig,
    Examples,
    JinjaTemplate,
    PackedConversations,
    Template,
    encode_conversations,
    read_conversations,
)
from lfm_jax.configuration import ConfigError, mistakes_in, nearest
from lfm_jax.interop.chat_template import read_template
from lfm_jax.interop.tokenizer_json import CHAT_TEMPLATE

_JINJA = ".jinja"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationSources:
    """Which conversations, and how they are written.

    sources: files, folders or patterns of .jsonl, .jsonl.gz or .jsonl.zst (see `ConversationsConfig`), one for each part of a
      mixture. held_out_share: the share of each that is measured and not trained on.
    chat_format: "lfm2", "lfm2_5", "lfm2_5_instruct", or a file of a template in Jinja's language; "auto": the template that
      comes with the tokenizer, or lfm2 where none does. One that is named comes with the tokenizer of what is fine-tuned by it.
    bad_records_limit: the share of records that may be unreadable or refused by the template; the quarantine lists them.
    """

    sources: tuple[str, ...]
    held_out_share: float = 0.05
    chat_format: str = "auto"
    bad_records_limit: float = 0.001

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty; give files of conversations")
        if not 0 <= self.bad_records_limit <= 1:
            raise ValueError(f"bad_records_limit must be a share from 0 to 1, got {self.bad_records_limit}")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share must be above 0 and below 1, got {self.held_out_share}")

    @property
    def names(self) -> list[str]:
        """Of the sources, for figures: the names of their files or folders without endings; numbered where two are alike."""
        plain = [epath.Path(source.rstrip("/")).name.partition(".")[0].replace("*", "all") for source in self.sources]
        return [name if plain.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(plain)]


class PreparedConversations(NamedTuple):
    """Of each source the examples of both splits, in the order of `ConversationSources.sources`."""

    train: list[Examples]
    held_out: list[Examples]


def find_template(chat_format: str, tokenizer_path: epath.Path) -> Template:
    """See `ConversationSources.chat_format`.

    Raises:
      ConfigError: there is no format or file of this name.
    """
    if chat_format in CHAT_FORMATS:
        return CHAT_FORMATS[chat_format]
    source, special = read_template(tokenizer_path)
    special = JinjaTemplate(source="").special_tokens | special
    if chat_format == "auto":
        known = {known.jinja(): known for known in CHAT_FORMATS.values()}  # what our own tokenizers carry, written faster
        known |= dict.fromkeys((None, CHAT_TEMPLATE), CHAT_FORMATS["lfm2"])
        if source in known:
            return known[source]
        return JinjaTemplate(source=source, name=f"the template of {tokenizer_path}", special_tokens=special)
    file = epath.Path(chat_format)
    if not chat_format.endswith(_JINJA) or not file.exists():
        raise ConfigError(
            f"chat_format {chat_format!r} is neither a format nor a file *{_JINJA} that is there. "
            f"{nearest(chat_format, [*CHAT_FORMATS, 'auto'])}"
        )
    return JinjaTemplate(source=file.read_text(), name=chat_format, special_tokens=special)


def keep_template(chat_format: str, tokenizer_path: epath.Path) -> None:
    """Writes the template of a format that is named into the folder of a workdir's tokenizer, where "auto", exports and the next
    stage find it."""
    if chat_format != "auto" and jax.process_index() == 0:
        template = find_template(chat_format, tokenizer_path)
        source = template.jinja() if isinstance(template, ChatFormat) else template.source
        (tokenizer_path / "chat_template.jinja").write_text(source)


def prepare_conversations(
    config: ConversationSources, workdir: epath.Path, tokenizer: Tokenizer, tokenizer_path: epath.Path
) -> PreparedConversations:
    """Reads and encodes all sources; what cannot be used is listed in conversations_quarantine_NAME.jsonl in the workdir.

    Raises:
      ConfigError: a source that is not there, has too much that cannot be used, or nothing of a split.
    """
    with mistakes_in("data.chat_format"):
        template = find_template(config.chat_format, tokenizer_path)
    prepared = PreparedConversations([], [])
    with tempfile.TemporaryDirectory() as elsewhere, mistakes_in("data.sources"):
        folder = workdir if jax.process_index() == 0 else epath.Path(elsewhere)  # one process tells
        for name, source in zip(config.names, config.sources, strict=True):
            where = ConversationsConfig(source=source, held_out_share=config.held_out_share)
            for split, found in (("train", prepared.train), ("held_out", prepared.held_out)):
                path = folder / f"conversations_quarantine_{name}_{split}.jsonl"
                with Quarantine(path) as quarantine:
                    conversations = read_conversations(where, split, quarantine)
                    found.append(encode_conversations(conversations, tokenizer, template, quarantine))
                    quarantine.check(config.bad_records_limit)
                if not quarantine.counts.bad:
                    path.unlink()
    return prepared


def source_figures(
    names: Sequence[str], sources: Sequence[Examples], packed: Sequence[PackedConversations]
) -> dict[str, Any]:
    """What there is to train on, and what of it is cut or left out in rows of a length: in all, and of each of `sources`."""
    each = [
        {
            "source": name, "conversations": examples.conversations, "refused": examples.refused, "texts": len(examples),
            "tokens": int(examples.lengths.sum()), "trained_tokens": examples.trained_tokens, "rows": int(rows.rows.sum()),
            "padding": rows.pad_share, "texts_cut": rows.truncated, "tokens_cut": rows.cut_tokens, "texts_dropped": rows.dropped,
        }
        for name, examples, rows in zip(names, sources, packed, strict=True)
    ]  # fmt: skip
    added = ("conversations", "refused", "tokens", "trained_tokens", "rows", "texts_cut", "tokens_cut", "texts_dropped")
    return {name: sum(source[name] for source in each) for name in added} | {"sources": each}
