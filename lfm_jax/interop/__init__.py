"""Models and tokenizers in the formats of other systems."""

from lfm_jax.interop import chat_template
from lfm_jax.interop.gguf_file import export_gguf
from lfm_jax.interop.gguf_header import read_gguf_header
from lfm_jax.interop.huggingface import ImportedModel, Place, export_folder, import_folder, is_model_folder, read_config
from lfm_jax.interop.huggingface_config import GenerationSettings
from lfm_jax.interop.tokenizer_json import read_tokenizer_json, sentencepiece_to_tokenizer, write_tokenizer

__all__ = [
    "GenerationSettings", "ImportedModel", "Place", "chat_template", "export_folder", "export_gguf", "import_folder",
    "is_model_folder", "read_config", "read_gguf_header", "read_tokenizer_json", "sentencepiece_to_tokenizer", "write_tokenizer",
]
