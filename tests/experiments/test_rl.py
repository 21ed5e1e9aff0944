"""Reinforcement learning as a user runs it, on a tiny model: it learns, its ratios are 1, and a stopped run goes on the same."""

import json
import shutil

import numpy as np
import pytest
from etils import epath
from rl_places import places, write_model

import run
from data_pipelines.conversations import CHAT_FORMATS
from data_pipelines.tasks import Problem, Step
from experiments.conversations import find_template
from experiments.rl import batches
from lfm_jax.models import ModelConfig
from lfm_jax.training import Checkpoints, group_advantages, read_metrics

MODEL = ModelConfig(
    vocab_size=336, tokenizer_vocab_size=330, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1,
    head_dim=16, mlp_dim=64, context_length=512,
)  # fmt: skip


class Bandit:
    """Right is what begins with a letter of the first half: one token decides."""

    name, max_difficulty = "bandit", 2

    def sample(self, seed, difficulty, split="train"):
        return Problem(messages=[{"role": "user", "content": "Go."}], reference=None, solution="cat")

    def score(self, response, reference):
        return {"correct": float(response[:1] in tuple("abcdefghijklm"))}


class Never(Bandit):
    """Nobody is ever right."""

    name = "never"

    def score(self, response, reference):
        return {"correct": 0.0}


class Echo:
    """Three turns, whatever is said; right is who has said an e."""

    name, max_difficulty = "echo", 1

    def reset(self, seed, difficulty, split="train"):
        self._said = []
        return Problem(messages=[{"role": "user", "content": "Go."}], reference=None)

    def step(self, response):
        self._said.append(response)
        over = len(self._said) == 3
        return Step([] if over else [{"role": "tool", "content": "So did the cat. " * len(self._said)}], over)

    def score(self):
        return {"correct": float("e" in "".join(self._said)), "format": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights, whose generation_config has a penalty that must not reach the rollouts."""
    folder = tmp_path_factory.mktemp("rl")
    write_model(MODEL, folder)
    (folder / "model" / "MANIFEST.sha256").unlink()  # as a folder from elsewhere
    (folder / "model" / "generation_config.json").write_text(json.dumps({"repetition_penalty": 5.0, "temperature": 0.1}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def environments_of_these_tests():
    with places(Echo, Bandit(), Never()):
        yield


# Episodes of several turns, several temperatures, a filter, two epochs in two parts, and answers that are one step behind.
EVERYTHING = {
    "environments.names": "echo", "rollouts.prompts": 8, "rollouts.temperatures": "((1.0,4),(0.6,2),(1.3,2))",
    "rollouts.top_p": 0.9, "rollouts.seq_len": 128, "rollouts.buckets": 1, "rollouts.max_new_tokens": 6,
    "rollouts.mini_batches": 2, "rollouts.epochs": 2, "rollouts.lag": 1, "rollouts.keep": 1, "policy.importance_cap": 2.0,
    "policy.kl_weight": 0.01, "rewards.ngram_token_penalty": -0.05, "rewards.ngram": 2, "evaluation.problems": 64,
    "evaluation.temperatures": "1.0", "engine.prefill_rows": 1, "engine.steps": 8, "optimizer.learning_rate": 0.01,
    "optimizer.schedule.warmup_steps": 0, "optimizer.schedule.decay_share": 0.0, "train.steps": 11, "train.evaluate_every": 11,
    "train.accumulation": 1, "train.checkpoint_every": 3, "export.check_tokens": 0,
}  # fmt: skip


def learn(folder, workdir, **changes):
    settings = {"init_from": f"{folder}/model", **EVERYTHING, **changes}
    given = (f"--config.{name}={value}" for name, value in settings.items())
    return run.main(["--config=configs/rl.py", f"--workdir={workdir}", *given])


def steps(workdir):
    """The figures of each step that two runs share, which are otherwise the same."""
    return [
        {name: value for name, value in record.items() if name.startswith("train/") and "per_second" not in name}
        for record in read_metrics(workdir)
        if "train/loss" in record
    ]


def rollouts(workdir, batch):
    return [json.loads(line) for line in (workdir / "rollouts" / f"{batch:06d}.jsonl").read_text().splitlines()]


def parameters(workdir):
    return {
        path.relative_to(workdir).as_posix(): path.read_bytes() for path in sorted((workdir / "export").rglob("*.safetensors"))
    }  # fmt: skip


@pytest.fixture(scope="module")
def everything(folder):
    assert learn(folder, folder / "everything") == 0
    return folder / "everything"


@pytest.fixture(scope="module")
def learned(folder):
    """What can be learnt in a few steps beside what cannot be learnt at all."""
    changes = {
        "environments.names": "bandit,never", "environments.weights": "3,1", "rollouts.epochs": 1, "rollouts.lag": 0,
        "train.steps": 20, "train.evaluate_every": 20, "train.checkpoint_every": 20, "evaluation.problems": 32,
        "optimizer.learning_rate": 0.02, "curriculum.cold_after": 2, "curriculum.probe_prompts": 2,
        "curriculum.probe_samples": 32, "rewards.ngram_token_penalty": 0.0, "rollouts.chat_format": "lfm2_5",
    }  # fmt: skip
    assert learn(folder, folder / "learned", **changes) == 0
    return folder / "learned"


def test_a_format_that_is_named_comes_with_the_tokenizer_from_then_on(learned):
    assert find_template("auto", epath.Path(learned / "tokenizer")) is CHAT_FORMATS["lfm2_5"]


def test_the_ratio_is_1_until_the_policy_moves(everything):
    """At temperatures 0.6 to 1.3, under top-p, over turns that the engine goes on from, by a model that has other settings."""
    first, second, _, _, fifth, *_ = steps(everything)
    for record in (first, fifth):  # each the first of its rollouts
        assert abs(record["train/ratio_max"] - 1) < 1e-4 and abs(record["train/ratio_min"] - 1) < 1e-4
    assert first["train/sampler_gap_max"] < 1e-4 and first["train/kl"] < 1e-6 and first["train/tokens"] > 50
    assert abs(second["train/ratio_max"] - 1) > 1e-3 and second["train/kl"] > 1e-6
    assert fifth["train/sampler_gap_max"] > 1e-3  # drawn by the policy that the first ones were drawn by
    answers = [answer for record in rollouts(everything, 3) for answer in record["answers"]]
    assert max(answer["turns"] for answer in answers) == 3 and any(0 in answer["drawn"] for answer in answers)


def test_advantages_are_those_of_the_rewards_that_were_written(everything):
    records = rollouts(everything, 3)
    rewards = np.array([[answer["reward"] for answer in record["answers"]] for record in records], np.float32)
    found = np.array([[answer["advantage"] for answer in record["answers"]] for record in records])
    np.testing.assert_array_equal(found, np.asarray(group_advantages(rewards).values))
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    spread = rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4
    np.testing.assert_allclose(found, np.where(np.ptp(rewards, axis=1, keepdims=True) > 0, centred / spread, 0), atol=1e-4)
    assert [record["slot"] for record in records] == list(range(8)) and {record["policy_step"] for record in records} == {4}
    assert steps(everything)[-1]["train/reward"] == pytest.approx(rewards.mean(), abs=1e-6)
    assert all("old_log_probs" in answer and "reference_log_probs" in answer for answer in records[0]["answers"])


def test_only_what_may_be_needed_is_kept(everything, learned):
    """The last, and the one that is learnt from while it is made; besides, what the checkpoints were made in the middle of."""
    kept = lambda workdir: [int(path.stem) for path in sorted((workdir / "rollouts").iterdir())]
    assert kept(learned) == [9, 10] and kept(everything) == [1, 2, 3]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder, everything, tmp_path):
    """After step 6: half of the updates from the second rollouts are made, and the third rollouts are there."""
    shutil.copytree(everything, tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.discard(newer_than=6)
    assert learn(folder, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["resumed_at_step"] == 6
    assert steps(tmp_path / "run") == steps(everything)
    assert parameters(tmp_path / "run") == parameters(everything) and parameters(everything)
    assert rollouts(tmp_path / "run", 3) == rollouts(everything, 3)


def test_answers_that_are_made_when_they_are_wanted_are_those_of_a_thread(folder, everything, tmp_path, monkeypatch):
    """Up to the first update from the second rollouts, which the first policy made; no checkpoint wants them before."""
    monkeypatch.setattr(batches, "beside_training", lambda: False)
    assert learn(folder, tmp_path / "run", **{"train.steps": 5, "train.evaluate_every": 5, "train.checkpoint_every": 5}) == 0
    assert steps(tmp_path / "run") == steps(everything)[:5]


def test_what_can_be_learnt_is_learnt_and_what_cannot_is_cold(learned):
    figures = json.loads((learned / "results.json").read_text())
    records = steps(learned)
    rewards = [record["train/right_of_bandit"] for record in records if "train/right_of_bandit" in record]
    assert np.mean(rewards[:4]) + 0.3 < np.mean(rewards[-4:])
    assert figures["accuracy_of_bandit_before"] < figures["accuracy_of_bandit"] - 0.2
    assert figures["accuracy_of_never"] == 0 and (learned / "rl.png").stat().st_size > 10_000
    assert [record["train/cold_of_bandit"] for record in records] == [0.0] * 20
    assert records[0]["train/cold_of_never"] == 0 and records[-1]["train/cold_of_never"] == 1
    cold = json.loads((learned / "cold.json").read_text())["environments"]
    assert list(cold) == ["never"] and cold["never"]["verdict"] == "absent" and cold["never"]["pass_at_32"] == 0
    assert [(each["samples"], each["right"], each["solved"]) for each in cold["never"]["prompts"]] == [(32, 0, None)] * 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"environments.names": "bandits"}, "--config.environments.names: no task is named 'bandits'; did you mean 'bandit'"),
        ({"environments.names": "bandit", "environments.difficulties": 3}, "bandit has difficulties 1 to 2, got 3"),
        ({"replay_routing": True}, "model is no mixture of experts: there is no routing to replay; leave it out"),
        ({"rollouts.seq_len": 1024}, "the model's context has 512 tokens, got 1024"),
        ({"rollouts.seq_len": 12}, "of 8 problems of echo at difficulty 1 none can be asked: too_long"),
    ],
)
def test_mistakes_are_told(folder, tmp_path, capsys, changes, message):
    assert learn(folder, tmp_path / "run", **changes) == 2
    assert message in capsys.readouterr().err
