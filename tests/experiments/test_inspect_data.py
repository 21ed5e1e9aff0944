"""Looking at tokenized text: the tables say what the loader does, the samples what is in the rows."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from data_pipelines import LoaderConfig, load_tokenizer, read_token_shards, training_batches


def _run(*arguments):
    return subprocess.run([sys.executable, ROOT / "run.py", *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Two tokenized texts by one tokenizer."""
    folder = tmp_path_factory.mktemp("inspect")
    for name, text in (("words", "the quick brown fox"), ("numbers", "zero one two three four")):
        lines = [json.dumps({"text": f"{text} {number} " * (1 + number % 40)}) for number in range(80)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        given = [] if name == "words" else [f"--config.tokenizer_from={folder}/words_tokens/tokenizer"]
        result = _run(
            "--config=configs/tokenize_data.py", f"--workdir={folder}/{name}_tokens",
            f"--config.data.source={folder}/{name}.jsonl", "--config.data.held_out_share=0.2",
            "--config.tokenizer.vocab_size=300", *given,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    return folder / "words_tokens", folder / "numbers_tokens"


def test_tables_and_samples_are_those_of_the_loader(workdirs, tmp_path):
    result = _run(
        "--config=configs/inspect_data.py", f"--workdir={tmp_path}/out", f"--config.tokens_from={workdirs[0]},{workdirs[1]}",
        "--config.loader.seq_len=64", "--config.loader.batch_size=4", "--config.loader.weights=3,1", "--config.steps=10",
        "--config.samples=6", "--config.sample_tokens=64",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    tokenizer = load_tokenizer(workdirs[0] / "tokenizer")
    sources = [read_token_shards(workdir / "tokens" / "train", tokenizer) for workdir in workdirs]
    assert [row["tokens"] for row in results["sources"]] == [shards.tokens for shards in sources]
    assert [row["rows_given"] for row in results["sources"]] == [30, 10]
    for row in results["sources"]:
        assert row["epochs_given"] == pytest.approx(row["rows_given"] / row["rows"])
        assert row["pad_share"] == pytest.approx(1 - (row["tokens"] + row["documents"]) / (64 * row["rows"]))
    assert results["positions"] == 10 * 4 * 64
    loader = LoaderConfig(seq_len=64, batch_size=4, weights=(3.0, 1.0))
    batches = training_batches(sources, loader, tokenizer, process_index=0, process_count=1)
    page = (tmp_path / "out" / "samples.html").read_text()
    shown = [tokenizer.decode(row[:4].tolist()).split()[0] for _ in range(2) for row in next(batches)["targets"]]
    batches.close()
    assert all(word in page for word in shown[:6])
    for picture in ("lengths.png", "mixture.png"):
        assert (tmp_path / "out" / picture).read_bytes()[:4] == b"\x89PNG"


def test_fewer_rows_than_samples_and_no_held_out_text_will_do(workdirs, tmp_path):
    """What `--config.splits=train` has tokenized, gone through once."""
    shutil.copytree(workdirs[0] / "tokenizer", tmp_path / "words" / "tokenizer")
    shutil.copytree(workdirs[0] / "tokens" / "train", tmp_path / "words" / "tokens" / "train")
    result = _run(
        "--config=configs/inspect_data.py", f"--workdir={tmp_path}/out", f"--config.tokens_from={tmp_path}/words",
        "--config.loader.seq_len=512", "--config.loader.epochs=1", "--config.samples=10000", "--config.sample_tokens=8",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (source,) = json.loads((tmp_path / "out" / "results.json").read_text())["sources"]
    assert source["rows"] <= source["rows_given"] < 10_000


def test_a_model_is_trained_on_a_mixture_of_tokenized_texts(workdirs, tmp_path):
    result = _run(
        "--config=configs/pretrain.py", f"--workdir={tmp_path}/run", f"--config.tokens_from={workdirs[0]},{workdirs[1]}",
        "--config.loader.weights=3,1", "--config.loader.seq_len=64", "--config.loader.batch_size=8", "--config.train.steps=6",
        "--config.loader.fill_in_the_middle=0.5", "--config.optimizer.schedule.warmup_steps=1",
        "--config.loader.stages=[{'from_step': 3, 'seq_len': 32, 'weights': (1.0, 1.0)}]", "--config.model.vocab_size=300",
        "--config.model.layer_types=conv,full_attention", "--config.model.embed_dim=32", "--config.model.mlp_dim=48",
        "--config.export=None", "--config.prompts=[]",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tokens_trained"] == 8 * (3 * 64 + 3 * 32)
    shards = [read_token_shards(workdir / "tokens" / "held_out") for workdir in workdirs]
    for suffix, held_out in zip(("", "_of_numbers_tokens"), shards, strict=True):
        assert results[f"tokens{suffix}"] == held_out.tokens + held_out.documents
        assert results[f"bits_per_byte{suffix}"] > 0
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.tokens_from={there}/none"], "--config.tokens_from: {there}/none/tokenizer holds no tokenizer"),
        (["--config.tokens_from={words}", "--config.steps=0"], "steps must be positive, got 0"),
        (
            ["--config.tokens_from={words}", "--config.loader.weights=1,2"],
            "--config.loader: weights (1.0, 2.0) are for 2 sources, and there are 1; give one for each",
        ),
    ],
)
def test_mistakes_are_named(changes, message, workdirs, tmp_path):
    names = {"there": tmp_path, "words": workdirs[0]}
    result = _run(
        "--config=configs/inspect_data.py", f"--workdir={tmp_path}/out", *(change.format(**names) for change in changes)
    )  # fmt: skip
    assert result.returncode != 0
    assert message.format(**names) in result.stderr
