"""Conversations and pairs of answers: read, written in a model's chat format, and made into batches with what is trained."""

from data_pipelines.conversations.batches import (
    PackedConversations,
    conversation_batches,
    conversation_evaluation_batches,
)
from data_pipelines.conversations.chat_formats import CHAT_FORMATS, ChatFormat, JinjaTemplate, Rendering, Template
from data_pipelines.conversations.describe import describe_row
from data_pipelines.conversations.examples import ConversationEncoder, Examples, encode_conversations, end_ids, symbol_ids
from data_pipelines.conversations.preferences import (
    PairRows,
    Preference,
    encode_preferences,
    preference_batches,
    preference_evaluation_batches,
    read_preferences,
)
from data_pipelines.conversations.reading import Conversation, ConversationsConfig, read_conversations
from data_pipelines.conversations.turns import Turns, part_symbols, render_prompts, render_turns

__all__ = [
    "CHAT_FORMATS", "ChatFormat", "Conversation", "ConversationEncoder", "ConversationsConfig", "Examples", "JinjaTemplate",
    "PackedConversations", "PairRows", "Preference", "Rendering", "Template", "Turns", "conversation_batches",
    "conversation_evaluation_batches", "describe_row", "encode_conversations", "encode_preferences", "end_ids",
    "part_symbols", "preference_batches", "preference_evaluation_batches", "read_conversations", "read_preferences",
    "render_prompts", "render_turns", "symbol_ids",
]
