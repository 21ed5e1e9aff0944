"""Text before tokenization: poor text, duplicates and text of evaluation sets are taken out; the rest is rated by difficulty."""
