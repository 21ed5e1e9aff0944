"""Units dealt out by Apache Beam give the bytes that processes of one machine give."""

import json
import sys
from pathlib import Path

import pytest

from data_pipelines import (
    Document,
    DocumentsConfig,
    TokenizationConfig,
    TokenizerConfig,
    load_tokenizer,
    read_token_shards,
    tokenize_corpus,
    tokenize_corpus_with_beam,
    train_tokenizer,
)
from data_pipelines.tokenization import assembly, beam

SYLLABLES = ("ka", "ru", "to", "mi", "se", "no", "hi")
TEXTS = [
    " ".join(SYLLABLES[text * word % 7] + SYLLABLES[(text + word * word) % 7] for word in range(40)) for text in range(90)
]
CONFIG = TokenizationConfig(unit_bytes=2000, shard_tokens=500, bad_records_limit=0.1, workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source, a tokenizer, and the tokens as one process writes them."""
    folder = tmp_path_factory.mktemp("beam")
    (folder / "source").mkdir()
    for number in range(6):
        lines = [json.dumps({"text": text}) for text in TEXTS[number::6]]
        (folder / "source" / f"{number}.jsonl").write_text("\n".join(["no json", *lines]))
    train_tokenizer(TokenizerConfig(vocab_size=300), [Document(text, "") for text in TEXTS], folder / "tokenizer")
    tokenize_corpus(data(folder), "train", load_tokenizer(folder / "tokenizer"), folder / "expected", CONFIG)
    return folder


def data(folder):
    return DocumentsConfig(source=str(folder / "source"), held_out_share=0.1)


def test_beam_writes_the_same_bytes(folder, tmp_path):
    pytest.importorskip("apache_beam")
    shards = tokenize_corpus_with_beam(
        data(folder), "train", folder / "tokenizer", tmp_path / "train", CONFIG, ["--runner=DirectRunner"]
    )
    assert len({shard.file.split("-")[1] for shard in shards.shards}) > 3 and shards.bad_records > 0
    expected = {path.name: path.read_bytes() for path in (folder / "expected").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()} == expected
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_what_processes_have_begun_beam_finishes(folder, tmp_path, monkeypatch):
    """Here down to the last file, so that nothing is left for Beam."""
    pytest.importorskip("apache_beam")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assembly, "write_index", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt()))
        tokenize_corpus(data(folder), "train", load_tokenizer(folder / "tokenizer"), tmp_path / "train", CONFIG)
    monkeypatch.setattr(beam, "_run_unit", None)
    shards = tokenize_corpus_with_beam(data(folder), "train", folder / "tokenizer", tmp_path / "train", CONFIG)
    assert shards.fingerprint == read_token_shards(folder / "expected").fingerprint


def test_another_tokenizer_on_a_worker_is_refused(folder):
    with pytest.raises(ValueError, match=r"is another tokenizer here \(fingerprint .*\) than where the pipeline .*0123"):
        beam._tokenizer(str(folder / "tokenizer"), "0123")
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert beam._tokenizer(str(Path(folder) / "tokenizer"), tokenizer.fingerprint).fingerprint == tokenizer.fingerprint


def test_without_beam_it_says_how_to_install_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ImportError, match=r"needs Apache Beam: pip install -c constraints.txt -e '.\[beam\]'"):
        tokenize_corpus_with_beam(data(folder), "train", folder / "tokenizer", tmp_path / "train", CONFIG)
    assert not list(tmp_path.iterdir())
