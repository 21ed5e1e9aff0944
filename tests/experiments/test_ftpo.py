"""From places where answers began to loop to a model that says something else there, as a user does it."""

import json
import shutil
import types

import jax
import numpy as np
import pytest

import run
from data_pipelines import Document, LoaderConfig, TokenizerConfig, load_tokenizer, train_tokenizer
from data_pipelines.conversations.reading import split_fraction
from data_pipelines.loading.rows import Place
from experiments import ftpo
from experiments.ftpo import Config, FinalTokenRows, Pair, flattened
from experiments.stages import load_stage, mesh_for
from lfm_jax.interop import export_folder
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import Checkpoints, TrainConfig, read_metrics, step

MODEL = ModelConfig(
    vocab_size=336, embed_dim=32, layer_types=("full_attention",), num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64,
    context_length=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights, and the beginnings of texts, to each of which its likeliest next token begins a loop."""
    folder = tmp_path_factory.mktemp("ftpo")
    text = "What is 3 + 4? Answer: 7\nSo did the cat. " * 50
    train_tokenizer(TokenizerConfig(vocab_size=330), [Document(text, "a")], folder / "tokenizer")
    params, buffers = functional(lambda rngs: Decoder(MODEL, rngs=rngs)).init(jax.random.key(1))
    export_folder(MODEL, params, buffers, folder / "model", tokenizer=folder / "tokenizer")
    rng, tokenizer = np.random.default_rng(0), load_tokenizer(folder / "model")
    prefixes = [[1, *rng.integers(20, 330, rng.integers(1, 9)).tolist(), *[50 + number % 3] * 30] for number in range(30)]
    with (folder / "pairs.jsonl").open("w") as file:
        for number, (prefix, row) in enumerate(zip(prefixes, _log_probs(folder, "model", prefixes), strict=True)):
            rejected, *chosen = [{"token": int(token)} for token in np.argsort(-row)[: 2 + number % 12]]
            messages = [{"role": "user", "content": f"{number}?"}]
            record = {"messages": messages, "prefix_ids": prefix, "rejected": rejected, "chosen": chosen}
            file.write(json.dumps(record | {"tokenizer": tokenizer.fingerprint}) + "\n")
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def _tune(folder, workdir, **changes):
    settings = {
        "init_from": f"{folder}/model", "pairs": folder / "pairs.jsonl", "held_out_share": 0.3, "loader.seq_len": 64,
        "loader.batch_size": 8, "train.steps": 12, "train.log_every": 1, "train.evaluate_every": 12, "train.checkpoint_every": 6,
        "optimizer.learning_rate": 0.003, "optimizer.schedule.warmup_steps": 0, "flatten": 0.0,
    } | changes  # fmt: skip
    given = (f"--config.{name}={value}" for name, value in settings.items())
    return run.main(["--config=configs/ftpo.py", f"--workdir={workdir}", *given])


@pytest.fixture(scope="module")
def tuned(folder):
    assert _tune(folder, folder / "run") == 0
    return json.loads((folder / "run" / "results.json").read_text())


def _log_probs(folder, name, prefixes):
    """Of the token behind each prefix, [prefixes, vocab], from one pass over whole sequences."""
    stage = load_stage(str(folder / name), ComputeConfig(), mesh_for(MeshConfig()))
    tokens = np.zeros((30, 64), np.int32)
    for row, prefix in enumerate(prefixes):
        tokens[row, : len(prefix)] = prefix

    @jax.jit
    def every(params, tokens):
        model = stage.functions.bind(params, stage.buffers)
        return jax.nn.log_softmax(model.logits(model(tokens).hidden))

    return np.asarray(every(stage.params, tokens))[np.arange(len(prefixes)), [len(prefix) - 1 for prefix in prefixes]]


def test_a_row_asks_at_the_last_token_of_the_text_and_nowhere_else():
    rows = FinalTokenRows([Pair(np.array([5, 6, 7], np.int32), 9, (1, 2))], seq_len=5, pad_id=0)
    row, padding = rows.with_reference(np.ones((1, 4), np.float32), "a").make([Place(0, 0, 0), None])
    assert [row[name].tolist() for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")] == [
        [5, 6, 7, 0, 0], [6, 7, 9, 0, 0], [1, 1, 1, 0, 0], [0, 1, 2, 0, 0], [0, 0, 1, 0, 0],
    ]  # fmt: skip
    assert row["chosen"].tolist() == [1, 2] + [-1] * 30 and not padding["loss_mask"].any() and (padding["chosen"] == -1).all()


@pytest.mark.parametrize("part", [0, 1])
def test_each_pair_gets_its_own_reference_where_the_rows_of_hosts_interleave(monkeypatch, part):
    """Two hosts: of four rows of the global batch the first one's are 0 and 3."""
    monkeypatch.setattr(step, "_parts", lambda mesh: (part, [(0, 3), (1, 2)]))
    monkeypatch.setattr(ftpo, "place_batch", lambda batch, mesh: batch)
    asked = []
    logits_of_all = lambda params, buffers, batch: asked.append(batch) or np.tile([[0.0], [2.0], [3.0], [1.0]], MODEL.vocab_size)
    monkeypatch.setattr(ftpo, "make_final_token_logits_step", lambda functions, mesh: logits_of_all)
    rows = FinalTokenRows([Pair(np.array([number], np.int32), 9, (8,)) for number in range(4)], 4, 0)
    config = types.SimpleNamespace(loader=LoaderConfig(seq_len=4, batch_size=4), compute=ComputeConfig())
    before = types.SimpleNamespace(functions=None, params={}, buffers={}, config=MODEL)
    made = ftpo._with_reference(config, rows, before, None).make([Place(0, 0, number) for number in range(4)])
    assert [batch["tokens"][:, 0].tolist() for batch in asked] == [[2 * part, 2 * part + 1]]
    assert [row["reference_logits"][0] for row in made] == [row["tokens"][0] for row in made] == [0, 1, 2, 3]


@pytest.mark.parametrize(("strength", "left"), [(0, {1: 64, 2: 4, 3: 4}), (0.5, {1: 16, 2: 4, 3: 4}), (1, {1: 4, 2: 4, 3: 4})])
def test_frequent_tokens_are_brought_down_to_the_median(strength, left):
    """Of 64, 4 and 4; what stays of one is drawn whatever the others are."""
    pairs = [Pair(np.array([n]), 1 if n < 64 else 2 + n % 2, ()) for n in range(72)]
    kept = flattened(pairs, strength, seed=0)
    assert {token: sum(pair.rejected == token for pair in kept) for token in left} == left
    numbers = [int(pair.prefix[0]) for pair in kept]
    assert numbers == sorted(set(numbers)) and kept == flattened(pairs, strength, seed=0)
    among_more = flattened([Pair(np.array([72]), 4, ())] * 4 + pairs, strength, seed=0)
    assert [pair for pair in among_more if pair.rejected == 1] == [pair for pair in kept if pair.rejected == 1]


def test_what_is_held_out_loops_less_and_the_figures_are_those_of_a_plain_pass(folder, pairs, tuned):
    held_out = [pair for pair in pairs if split_fraction([*pair["messages"], {"role": "assistant"}]) < 0.3]
    assert tuned["held_out_pairs"] == len(held_out) > 1
    assert tuned["pairs"] + tuned["pairs_left_out_as_frequent"] + len(held_out) == len(pairs)
    for name, suffix in (("model", "_before"), ("run", "")):
        rows = _log_probs(folder, name, [pair["prefix_ids"] for pair in held_out])
        lost = [row[pair["rejected"]["token"]] for row, pair in zip(rows, held_out, strict=True)]
        wins = [
            np.mean([row[each["token"]] > other for each in pair["chosen"]])
            for row, other, pair in zip(rows, lost, held_out, strict=True)
        ]
        assert tuned[f"chosen_win{suffix}"] == pytest.approx(np.mean(wins), abs=1e-6)
        assert tuned[f"rejected_probability{suffix}"] == pytest.approx(np.mean(np.exp(lost)), rel=1e-3)
    assert tuned["chosen_win"] > tuned["chosen_win_before"] + 0.2 and tuned["change_before"] == pytest.approx(0, abs=1e-9)
    assert tuned["rejected_probability"] < 0.7 * tuned["rejected_probability_before"]
    reached = [record["step"] for record in read_metrics(folder / "run") if record.get("train/chosen_win", 0) >= 0.4]
    assert tuned["chosen_win_reached_at_step"] == reached[0]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder, tuned, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.discard(newer_than=6)
    assert _tune(folder, tmp_path / "run") == 0
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["resumed_at_step"] == 6 and again["loss"] == tuned["loss"] and again["lead"] == tuned["lead"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"held_out_share": 0.0}, "held_out_share must be above 0 and below 1, got 0.0"),
        ({"flatten": 1.5}, "flatten must be from 0 to 1, got 1.5"),
        ({"chosen_win": -1.0}, "chosen_win must be from 0 to 1, got -1.0"),
        ({"loader": LoaderConfig(seq_len=8, batch_size=8, order="difficulty")}, "pairs are of one source and come shuffled"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    settings = {"loader": LoaderConfig(seq_len=8, batch_size=8), "train": TrainConfig(steps=1)} | changes
    with pytest.raises(ValueError, match=message):
        Config(init_from="a", pairs="b", **settings)


def test_what_is_no_pair_of_this_model_is_told(folder, pairs, tmp_path, capsys):
    assert _tune(folder, tmp_path / "short", **{"loader.seq_len": 1}) == 2
    assert f"0 pairs to train on and 0 held out, of {len(pairs)} with {len(pairs)} longer" in capsys.readouterr().err
    wrong = {"has ids of the tokenizer 000000000000": {"tokenizer": "0" * 64}, "has no 'chosen'": {"chosen": None}}
    for number, (message, change) in enumerate(wrong.items()):
        record = {name: value for name, value in (pairs[0] | change).items() if value is not None}
        (tmp_path / "other.jsonl").write_text(json.dumps(record) + "\n")
        assert _tune(folder, tmp_path / str(number), pairs=tmp_path / "other.jsonl") == 2
        assert message in capsys.readouterr().err

