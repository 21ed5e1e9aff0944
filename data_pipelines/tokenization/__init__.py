"""From text to ids: tokenizers, and tokenized text on disk."""
