"""From text to batches: documents, tokenizers, token shards, packing, loading, and the count models to compare with."""

from data_pipelines.loading.loader import DatasetIterator, LoaderConfig, evaluation_batches, training_batches
from data_pipelines.loading.mixture import StageConfig
from data_pipelines.loading.packed_shards import PackedShards, pack_shards, rows_folder
from data_pipelines.loading.packing import Packing, pack_documents
from data_pipelines.loading.rows import Batch
from data_pipelines.ngram_baseline import ngram_bits_per_byte
from data_pipelines.sources.documents import (
    Document,
    DocumentsConfig,
    SourceFile,
    list_source_files,
    read_documents,
    read_source_file,
)
from data_pipelines.sources.quarantine import Quarantine, RecordCounts
from data_pipelines.tokenization.assembly import check_source
from data_pipelines.tokenization.beam import tokenize_corpus_with_beam
from data_pipelines.tokenization.parallel import tokenize_corpus
from data_pipelines.tokenization.shard_writer import last_written, write_token_shards
from data_pipelines.tokenization.token_shards import Shard, TokenShards, read_token_shards
from data_pipelines.tokenization.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from data_pipelines.tokenization.units import TokenizationConfig

__all__ = [
    "Batch", "DatasetIterator", "Document", "DocumentsConfig", "LoaderConfig", "PackedShards", "Packing", "Quarantine",
    "RecordCounts", "Shard", "SourceFile", "StageConfig", "TokenShards", "TokenizationConfig", "Tokenizer", "TokenizerConfig",
    "check_source", "evaluation_batches", "last_written", "list_source_files", "load_tokenizer", "ngram_bits_per_byte",
    "pack_documents", "pack_shards", "read_documents", "read_source_file", "read_token_shards", "rows_folder",
    "tokenize_corpus", "tokenize_corpus_with_beam", "train_tokenizer", "training_batches", "write_token_shards",
]
