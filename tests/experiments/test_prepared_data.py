"""Text in a workdir: made once, gone on with where publishing was stopped, and not taken for another."""

import dataclasses
import json

import pytest
from etils import epath

from data_pipelines import DocumentsConfig, TokenizationConfig, TokenizerConfig
from data_pipelines.tokenization import shard_writer
from experiments.prepared_data import TOKENS, prepare_rows, prepare_split, prepare_tokenizer, read_tokenized
from lfm_jax.configuration import ConfigError

WORDS = "the cat sat on a mat while one dog ran after two birds that sang in their tree".split()
HERE = TokenizationConfig(workers=1)


def write_texts(folder, step):
    folder.mkdir()
    texts = [" ".join(WORDS[(step * number + word) % len(WORDS)] for word in range(40)) for number in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DocumentsConfig(source=str(folder), held_out_share=0.3)


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "text", step=3)


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path / "run")


@pytest.fixture
def tokenizer(data, workdir):
    return prepare_tokenizer(workdir, data, TokenizerConfig(vocab_size=290), None)


@pytest.mark.parametrize("what", ["tokens", "rows"])
def test_where_folders_cannot_be_renamed_a_stopped_run_publishes_the_rest(what, data, workdir, tokenizer, monkeypatch):
    monkeypatch.setattr(shard_writer, "is_remote", lambda path: True)
    folder = workdir / TOKENS / "train" / ("" if what == "tokens" else "rows-16")
    copy = type(workdir).copy

    def killed(path, target, **options):
        if target == folder / "index.json":
            raise KeyboardInterrupt
        return copy(path, target, **options)

    def make():
        prepare_rows(prepare_split(workdir, data, "train", tokenizer, HERE), 16)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(workdir), "copy", killed)
        make()
    assert folder.is_dir() and not (folder / "index.json").exists()
    make()
    assert (folder / "index.json").exists()


def test_tokens_of_another_text_are_not_taken_for_this_one(data, workdir, tokenizer, tmp_path):
    tokens = prepare_split(workdir, data, "held_out", tokenizer, HERE).tokens
    other = write_texts(tmp_path / "other", step=5)
    for changed in (
        dataclasses.replace(data, source=other.source), dataclasses.replace(data, held_out_share=0.5),
        dataclasses.replace(data, held_out_source=other.source), dataclasses.replace(data, text_field="title"),
    ):  # fmt: skip
        message = "--config.data: .*held_out was tokenized from other text: .* was .*, is .*; go on with the same, take"
        with pytest.raises(ConfigError, match=message):
            prepare_split(workdir, changed, "held_out", tokenizer, HERE)
    (tmp_path / "text").rename(tmp_path / "moved")  # where the same text lies does not matter, nor whether it is there still
    for same in (data, dataclasses.replace(data, source=str(tmp_path / "moved"))):
        assert prepare_split(workdir, same, "held_out", tokenizer, HERE).tokens == tokens


def test_what_is_not_needed_may_be_missing(data, workdir, tokenizer):
    shards = prepare_split(workdir, data, "train", tokenizer, HERE)
    text = read_tokenized([str(workdir)], ("train",))
    assert [each.fingerprint for each in text.train] == [shards.fingerprint] and text.held_out == []
    with pytest.raises(ConfigError, match="--config.tokens_from: .*held_out/index.json does not exist"):
        read_tokenized([str(workdir)])
