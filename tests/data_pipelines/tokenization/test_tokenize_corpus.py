"""A corpus tokenized in units: the same bytes however the work was dealt out or interrupted, and nothing mixed or lost."""

import dataclasses
import gzip
import json
import os
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines import (
    Document,
    DocumentsConfig,
    SourceFile,
    TokenizationConfig,
    TokenizerConfig,
    load_tokenizer,
    read_documents,
    read_token_shards,
    tokenize_corpus,
    train_tokenizer,
    write_token_shards,
)
from data_pipelines.sources.documents import _fraction
from data_pipelines.tokenization import assembly, parallel, shard_writer, units
from data_pipelines.tokenization.tokenizer import SentencePieceTokenizer
from lfm_jax.interop import sentencepiece_to_tokenizer

SMALL = TokenizationConfig(unit_bytes=6000, shard_tokens=1000, workers=1)
BAD_LINES = {2: ["no json", '{"text": null}'], 5: ['{"other": "text"}']}


def _texts():
    random = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "caf\u00e9", "\u4f60\u597d", "1234", "def", "return\n"]
    return [" ".join(random.choice(words, random.integers(1, 120))) for _ in range(300)]


TEXTS = _texts()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Ten files, some with bad lines, one of them large."""
    folder = tmp_path_factory.mktemp("source")
    cuts = [0, 10, 20, 30, 40, 150, 170, 200, 220, 260, 300]
    for number, (first, last) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        lines = [json.dumps({"text": TEXTS[index], "hard": index / 300}) for index in range(first, last)]
        lines[3:3] = BAD_LINES.get(number, [])
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(source):
    return DocumentsConfig(source=str(source), difficulty_field="hard", held_out_share=0.2)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The same tokenizer in both forms."""
    folder = tmp_path_factory.mktemp("tokenizers")
    documents = [Document(text, "") for text in TEXTS]
    trained = train_tokenizer(TokenizerConfig(vocab_size=320), documents, folder / "model")
    (folder / "tokenizer.json").write_text(sentencepiece_to_tokenizer(folder / "model" / "tokenizer.model", 1).to_str())
    return {"tokenizer.model": trained, "tokenizer.json": load_tokenizer(folder / "tokenizer.json")}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["tokenizer.model"]


@pytest.fixture(scope="module")
def lenient():
    return dataclasses.replace(SMALL, bad_records_limit=0.1)


@pytest.fixture(scope="module")
def written(data, tokenizer, lenient, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "train"
    tokenize_corpus(data, "train", tokenizer, folder, lenient)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def files_of(sizes):
    return [SourceFile(f"{number}.txt", f"{number}.txt", size) for number, size in enumerate(sizes)]


@hypothesis.given(st.lists(st.integers(0, 300)), st.integers(1, 200))
def test_units_are_consecutive_files_as_many_as_fit(sizes, unit_bytes):
    planned = units.plan_units(files_of(sizes), unit_bytes)
    assert [file for unit in planned for file in unit.files] == files_of(sizes)
    assert [unit.number for unit in planned] == list(range(len(planned)))
    assert all(unit.bytes == sum(file.bytes for file in unit.files) for unit in planned)
    assert all(unit.bytes <= unit_bytes or len(unit.files) == 1 for unit in planned)
    assert all(unit.bytes + following.files[0].bytes > unit_bytes for unit, following in zip(planned, planned[1:], strict=False))


def test_every_document_is_there_in_order(written, data, tokenizer):
    shards = read_token_shards(written, tokenizer, check_contents=True)
    assert len({shard.file.split("-")[1] for shard in shards.shards}) > 4
    assert {shard.file.split("-")[2] for shard in shards.shards} >= {"000.array_record", "001.array_record"}
    with pytest.raises(ValueError, match="no JSON"):
        list(read_documents(data, "train"))
    expected = [text for number, text in enumerate(TEXTS) if _in_train(data, number)]
    assert [tokenizer.decode(shards[index]) for index in range(len(shards))] == expected
    assert shards.text_bytes == len("".join(expected).encode())
    assert 0.3 < np.mean([shard.difficulty for shard in shards.shards]) < 0.7
    assert [shard.difficulty for shard in shards.shards] == sorted(shard.difficulty for shard in shards.shards)


def _in_train(data, number):
    """Whether the document is on the training side, by its file and line."""
    cuts = [10, 20, 30, 40, 150, 170, 200, 220, 260, 300]
    file = int(np.searchsorted(cuts, number, side="right"))
    line = number - ([0, *cuts][file])
    line += 1 + (len(BAD_LINES.get(file, [])) if line >= 3 else 0)
    return _fraction(f"part-{file}.jsonl:{line}") >= data.held_out_share


def test_bad_records_are_counted_and_listed(written, source, data):
    listed = [json.loads(line) for line in (written / "quarantine.jsonl").read_text().splitlines()]
    bad = {f"part-{file}.jsonl:{4 + number}" for file, lines in BAD_LINES.items() for number in range(len(lines))}
    assert [entry["where"] for entry in listed] == sorted(where for where in bad if _fraction(where) >= data.held_out_share)
    index = json.loads((written / "index.json").read_text())
    assert sum(index["records"]["bad"].values()) == read_token_shards(written).bad_records == len(listed) > 0
    assert index["records"]["seen"] == index["documents"] + len(listed)
    assert index["split"] == "train" and index["source"]["source"] == str(source)


def test_a_damaged_file_ends_the_run_and_repaired_the_rest_is_done(source, data, tokenizers, lenient, tmp_path):
    """In processes, which hand on what was wrong; then the bytes are those of one process that met no damage."""
    copy = tmp_path / "source"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    whole = gzip.compress("".join(json.dumps({"text": text, "hard": 1.0}) + "\n" for text in TEXTS[:20]).encode(), mtime=0)
    (copy / "part-3.jsonl.gz").write_bytes(whole[:40] + bytes(20) + whole[60:])
    data = dataclasses.replace(data, source=str(copy))
    two, tokenizer = dataclasses.replace(lenient, workers=2), tokenizers["tokenizer.json"]
    with pytest.raises(ValueError, match="part-3.jsonl.gz: damaged"):
        tokenize_corpus(data, "train", tokenizer, tmp_path / "two", two)
    there = {path.name: path.stat().st_ino for path in (tmp_path / ".two.part").iterdir()}
    assert any(name.startswith("unit-") for name in there) and "index.json" not in there and not (tmp_path / "two").exists()
    (copy / "part-3.jsonl.gz").write_bytes(whole)
    tokenize_corpus(data, "train", tokenizer, tmp_path / "two", two)
    tokenize_corpus(data, "train", tokenizer, tmp_path / "one", lenient)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {path.name: path.stat().st_ino for path in (tmp_path / "two").iterdir()}.items() >= {
        (name, inode) for name, inode in there.items() if name.startswith(("tokens-", "lengths-"))
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "source", "two"]


def test_a_corpus_of_one_unit_is_what_a_stream_gives(data, source, tokenizer, tmp_path):
    clean = dataclasses.replace(data, source=str(source / "part-4.jsonl"), difficulty_field=None)
    corpus = tokenize_corpus(clean, "train", tokenizer, tmp_path / "corpus", dataclasses.replace(SMALL, unit_bytes=1 << 20))
    stream = write_token_shards(read_documents(clean, "train"), tokenizer, tmp_path / "stream", shard_tokens=1000)
    assert len(corpus.shards) > 2 and corpus.shards == stream.shards and corpus.fingerprint == stream.fingerprint
    for shard in corpus.shards:
        assert (tmp_path / "corpus" / shard.file).read_bytes() == (tmp_path / "stream" / shard.file).read_bytes()


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), min_size=1, max_size=8))
def test_any_text_comes_back_from_the_shards(tokenizers, texts):
    for tokenizer in tokenizers.values():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            everything = DocumentsConfig(source=folder, held_out_share=1)
            shards = tokenize_corpus(everything, "held_out", tokenizer, Path(folder) / "tokens", SMALL)
            assert [tokenizer.decode(shards[index]) for index in range(len(shards))] == texts


def test_what_is_finished_is_not_done_again(data, tokenizer, lenient, written, tmp_path, monkeypatch):
    done = []

    def interrupted(work, unit, *arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(unit.number)
        units.tokenize_unit(work, unit, *arguments)

    monkeypatch.setattr(parallel, "tokenize_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(data, "train", tokenizer, tmp_path / "train", lenient)
    (part,) = tmp_path.iterdir()
    assert part.name == ".train.part" and not (part / "index.json").exists()
    (part / f"tokens-{done[1]:05}-000.array_record").write_bytes(b"lost")  # as by a machine without power
    (part / ".unit-00001-killed").mkdir()
    again = []
    spy = lambda work, unit, *arguments: again.append(unit.number) or units.tokenize_unit(work, unit, *arguments)
    monkeypatch.setattr(parallel, "tokenize_unit", spy)
    tokenize_corpus(data, "train", tokenizer, tmp_path / "train", lenient)
    assert not set(again) & {done[0], done[2]} and done[1] in again
    assert contents(tmp_path / "train") == contents(written)
    with pytest.raises(FileExistsError, match="train exists; read it with read_token_shards, or delete it"):
        tokenize_corpus(data, "train", tokenizer, tmp_path / "train", lenient)


@pytest.mark.parametrize("at", ["write_index", "publish"])
def test_an_end_that_was_interrupted_is_taken_up(at, data, tokenizer, lenient, written, tmp_path, monkeypatch):
    def killed(*arguments):
        if at == "write_index":  # the index is there, nothing is cleared away
            shard_writer.write_index(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assembly, at, killed)
        tokenize_corpus(data, "train", tokenizer, tmp_path / "train", lenient)
    with pytest.raises(ValueError, match="shard_tokens was 1000, is 999"):
        tokenize_corpus(data, "train", tokenizer, tmp_path / "train", dataclasses.replace(lenient, shard_tokens=999))
    monkeypatch.setattr(parallel, "tokenize_unit", None)
    tokenize_corpus(data, "train", tokenizer, tmp_path / "train", lenient)
    assert contents(tmp_path / "train") == contents(written)


def test_units_of_other_settings_are_not_mixed(data, source, tokenizer, lenient, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assembly, "write_index", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt()))
        tokenize_corpus(data, "train", tokenizer, tmp_path / "train", lenient)
    other = train_tokenizer(TokenizerConfig(vocab_size=321), [Document(text, "") for text in TEXTS], tmp_path / "other")
    for changed, message in (
        ((data, "held_out", tokenizer, lenient), "split was train, is held_out; go on with the same, or delete it"),
        ((data, "train", tokenizer, dataclasses.replace(lenient, unit_bytes=7000)), "unit_bytes was 6000, is 7000"),
        ((data, "train", other, lenient), "tokenizer.vocab_size was 320, is 321"),
        ((dataclasses.replace(data, source=str(source / "part-*.jsonl")), "train", tokenizer, lenient), "source.source was"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize_corpus(*changed[:3], tmp_path / "train", changed[3])


def test_too_many_bad_records_are_refused(data, source, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"records are bad, .* where 0.100% may be: .*part-\d.jsonl"):
        tokenize_corpus(data, "train", tokenizer, tmp_path / "train", SMALL)
    assert (tmp_path / ".train.part" / "quarantine.jsonl").read_text()
    # Where no record can be read, the first unit tells it.
    done = []
    spy = lambda work, unit, *arguments: done.append(unit.number) or units.tokenize_unit(work, unit, *arguments)
    monkeypatch.setattr(parallel, "tokenize_unit", spy)
    wrong = dataclasses.replace(data, text_field="body")
    with pytest.raises(ValueError, match=r"records are bad, 100.000% where"):
        tokenize_corpus(wrong, "train", tokenizer, tmp_path / "wrong", dataclasses.replace(SMALL, bad_records_limit=0.01))
    assert len(done) == 1


def test_a_dirty_unit_among_clean_ones_does_not_stop_the_run(tmp_path, tokenizer, monkeypatch):
    """Though it comes first, being the largest, and half of it is bad: of all records, few are."""
    (tmp_path / "a.jsonl").write_text(f"no json {'x' * 100}\n" * 5 + '{"text": "good"}\n' * 5)
    for number in range(50):
        (tmp_path / f"b{number}.jsonl").write_text('{"text": "good"}\n' * 10)
    done = []
    spy = lambda work, unit, *arguments: done.append(unit.number) or units.tokenize_unit(work, unit, *arguments)
    monkeypatch.setattr(parallel, "tokenize_unit", spy)
    config = TokenizationConfig(unit_bytes=100, shard_tokens=1000, bad_records_limit=0.02, workers=1)
    everything = DocumentsConfig(source=str(tmp_path / "*.jsonl"), held_out_share=1)
    shards = tokenize_corpus(everything, "held_out", tokenizer, tmp_path / "tokens", config)
    assert (shards.documents, shards.bad_records) == (505, 5) and done == list(range(51))


def test_nothing_to_tokenize_is_refused(source, tokenizer, tmp_path):
    nothing = DocumentsConfig(source=str(source / "part-0.jsonl"), held_out_share=1)
    with pytest.raises(ValueError, match="no document to tokenize in the 'train' split of .*'; change held_out_share"):
        tokenize_corpus(nothing, "train", tokenizer, tmp_path / "train", SMALL)
    assert not list(tmp_path.iterdir())


def test_settings_that_make_no_sense_are_refused():
    for field in ("unit_bytes", "shard_tokens", "workers"):
        with pytest.raises(ValueError, match=f"{field} must be positive, got 0"):
            TokenizationConfig(**{field: 0})
    with pytest.raises(ValueError, match="bad_records_limit must be a share from 0 to 1, got 2"):
        TokenizationConfig(bad_records_limit=2)


def test_a_unit_that_is_not_there_is_named(data, tokenizer, lenient, tmp_path):
    unfinished = assembly.Assembly(data, "train", tokenizer, tmp_path / "train", lenient)
    with pytest.raises(FileNotFoundError, match="unit-00000.json is missing: that unit is not tokenized"):
        unfinished.finish()


class Deadly(SentencePieceTokenizer):
    """Ends its process, as the kernel does where memory runs out."""

    def encode_batch(self, texts, threads=None):
        os._exit(9)


def test_a_process_that_was_ended_is_told(data, lenient, tmp_path, tokenizer):
    deadly = Deadly(tokenizer._processor.serialized_model_proto(), "deadly")
    with pytest.raises(RuntimeError, match="a process that tokenized was ended from outside, .* the same command goes on"):
        tokenize_corpus(data, "train", deadly, tmp_path / "train", dataclasses.replace(lenient, workers=2))


@pytest.mark.parametrize("cores", [1, 8, 200])
def test_threads_are_shared_by_what_there_is_to_do(cores):
    """One unit alone has all cores, a large one most of them, and of many each has one."""
    assert parallel._share_of(cores, 7, 7) == cores
    assert parallel._share_of(cores, 1, 1000) == 1
    assert parallel._share_of(cores, 900, 1000) == max(1, round(0.9 * cores))
