"""From text to batches: documents, tokenizers, token shards, packing, loading, and the count models to compare with."""

from data_pipelines.loading.loader import DatasetIterator, LoaderConfig, evaluation_batches, training_batches
from data_pipelines.loading.packing import Batch, PackedRows, Packing, pack_documents
from data_pipelines.ngram_baseline import ngram_bits_per_byte
from data_pipelines.sources.documents import Document, DocumentsConfig, read_documents
from data_pipelines.tokenization.token_shards import TokenShards, read_token_shards, write_token_shards
from data_pipelines.tokenization.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer

__all__ = [
    "Batch", "DatasetIterator", "Document", "DocumentsConfig", "LoaderConfig", "PackedRows", "Packing", "TokenShards",
    "Tokenizer", "TokenizerConfig", "evaluation_batches", "load_tokenizer", "ngram_bits_per_byte", "pack_documents",
    "read_documents", "read_token_shards", "train_tokenizer", "training_batches", "write_token_shards",
]
