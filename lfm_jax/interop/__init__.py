"""Models and tokenizers in the formats of other systems."""

from lfm_jax.interop.huggingface import ImportedModel, Place, export_folder, import_folder, read_config
from lfm_jax.interop.huggingface_config import GenerationSettings
from lfm_jax.interop.tokenizer_json import sentencepiece_to_tokenizer, write_tokenizer

__all__ = [
    "GenerationSettings", "ImportedModel", "Place", "export_folder", "import_folder", "read_config",
    "sentencepiece_to_tokenizer", "write_tokenizer",
]
