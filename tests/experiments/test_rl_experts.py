"""Reinforcement learning of a mixture of experts, by adapters: what routers chose is kept with the answers, and replayed."""

import json

import jax
import numpy as np
import pytest
from rl_places import places, write_model

import run
from data_pipelines.tasks import Problem, Step
from experiments import rl
from experiments.rl.episodes import Episode
from experiments.rl.records import arrays, decoded_routing, encoded_routing
from experiments.stages import load_stage
from lfm_jax.generation import Completion
from lfm_jax.models import ComputeConfig, ModelConfig, MoEConfig
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import read_metrics

MODEL = ModelConfig(
    vocab_size=336, tokenizer_vocab_size=330, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1,
    head_dim=16, mlp_dim=64, moe=MoEConfig(num_experts=8, experts_per_token=2, mlp_dim=16, num_dense_layers=1),
    context_length=512,
)  # fmt: skip
SHAPE = (1, 2)
SETTINGS = {
    "environments.names": "bandit,echo", "rollouts.prompts": 8, "rollouts.temperatures": "((1.0,4),)", "rollouts.seq_len": 64,
    "rollouts.buckets": 1, "rollouts.max_new_tokens": 6, "rollouts.mini_batches": 2, "rollouts.lag": 1,
    "policy.importance_cap": 2.0, "policy.kl_weight": 0.01, "replay_routing": True, "evaluation.problems": 1,
    "evaluation.temperatures": "1.0", "engine.prefill_rows": 1, "engine.prefill_chunk": 8, "engine.slots": 2,
    "engine.steps": 8, "low_rank.rank": 4, "optimizer.learning_rate": 0.05, "optimizer.schedule.warmup_steps": 0,
    "train.steps": 4, "train.evaluate_every": 4, "train.checkpoint_every": 4, "train.accumulation": 2,
}  # fmt: skip

REPLAYING: list[bool] = []  # whether the log-probabilities of each batch were those of a routing


class Bandit:
    """Right is what begins with a letter of the first half."""

    name, max_difficulty = "bandit", 1

    def sample(self, seed, difficulty, split="train"):
        return Problem(messages=[{"role": "user", "content": "Go. " * (1 + seed % 3)}], reference=None, solution="cat")

    def score(self, response, reference):
        return {"correct": float(response[:1] in tuple("abcdefghijklm"))}


class Echo:
    """Two turns, whatever is said; right is who has said an e."""

    name, max_difficulty = "echo", 1

    def reset(self, seed, difficulty, split="train"):
        self._said = []
        return Problem(messages=[{"role": "user", "content": "Go."}], reference=None)

    def step(self, response):
        self._said.append(response)
        over = len(self._said) == 2
        return Step([] if over else [{"role": "tool", "content": "So did the cat."}], over)

    def score(self):
        return {"correct": float("e" in "".join(self._said))}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The workdir of a run on one device."""
    folder = tmp_path_factory.mktemp("rl_experts")
    write_model(MODEL, folder)
    with places(Echo, Bandit()) as patch:
        make_step = rl.make_policy_log_probs_step

        def watched(*arguments, **options):
            step = make_step(*arguments, **options)
            return lambda params, buffers, batch: REPLAYING.append("routing" in batch) or step(params, buffers, batch)

        patch.setattr(rl, "make_policy_log_probs_step", watched)
        given = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
        command = ["--config=configs/rl.py", f"--workdir={folder / 'run'}", f"--config.init_from={folder / 'model'}"]
        assert run.main([*command, *given]) == 0
    return folder / "run"


def answers(workdir, batch):
    lines = (workdir / "rollouts" / f"{batch:06d}.jsonl").read_text().splitlines()
    return [(record, answer) for record in map(json.loads, lines) for answer in record["answers"]]


def test_of_the_policys_own_answers_all_routing_is_equal_until_it_moves(learned):
    """Over turns that the engine goes on from, in micro-batches; the next answers are drawn by what the first were drawn by."""
    steps = [record for record in read_metrics(learned) if "train/loss" in record]
    assert len(steps) == 4 and steps[0]["train/routing_equal"] == pytest.approx(1) and steps[0]["train/sampler_gap_max"] < 1e-4
    assert abs(steps[0]["train/ratio_max"] - 1) < 1e-4 and steps[0]["train/kl"] < 1e-6
    assert all(0 < record["train/routing_equal"] < 1 for record in steps[1:]) and steps[2]["train/routing_equal"] < 1
    assert steps[2]["train/sampler_gap_max"] > 1e-3 and abs(steps[2]["train/ratio_max"] - 1) < 1e-4


def test_the_trainers_own_log_probs_are_of_the_routing_and_the_references_are_not(learned):
    assert REPLAYING == [True, True, False, False] * 2  # both parts of each batch, the trainer's first


def test_each_environment_has_its_entropy_and_its_gap(learned):
    seen = set()
    for record in (record for record in read_metrics(learned) if "train/loss" in record):
        for figure in ("entropy", "sampler_gap", "routing_equal"):
            found = [record.get(f"train/{figure}_of_{name}") for name in ("bandit", "echo")]
            low, *_, high = sorted(2 * [value for value in found if value is not None])  # an update may have answers of one alone
            assert low - 1e-6 <= record[f"train/{figure}"] <= high + 1e-6, figure
            seen.add((figure, None not in found and low < high - 1e-6))
    assert {("entropy", True), ("sampler_gap", True), ("routing_equal", True)} <= seen


def test_adapters_alone_have_moved_and_are_merged_for_the_next_stage(learned):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    before, after = (load_stage(str(path), ComputeConfig(), mesh) for path in (learned.parent / "model", learned))
    jax.tree.map_with_path(
        lambda path, old, new: np.testing.assert_equal(
            bool(np.any(old != new)), path[-1].key in ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj", "gate", "up", "down")
        ),
        before.params, after.params,
    )  # fmt: skip


def test_the_experts_of_every_token_but_the_last_are_kept_with_the_answer(learned):
    turns = set()
    for record, answer in answers(learned, 1):
        routing = decoded_routing(answer["routing"], SHAPE)
        assert len(routing) == len(record["prompt_ids"]) + len(answer["token_ids"]) - 1
        assert ((routing >= 0) & (routing < 8)).all() and (routing[..., 0] != routing[..., 1]).all()
        turns.add(answer["turns"])
    assert turns == {1, 2}


def test_an_episode_has_the_experts_of_its_tokens_as_they_were_first_read():
    first, second = np.arange(2 * 5).reshape(5, *SHAPE), 100 + np.arange(2 * 9).reshape(9, *SHAPE)

    class Said:
        stop_ids = ()

        def text(self, ids):
            return ""

    environment = Echo()
    episode = Episode(environment, environment.reset(0, 1), [1, 2, 3], 1.0, (0,))
    turn = lambda tokens, routing: Completion(tokens, [], [], "", "stop", [0.0] * len(tokens), None, routing)
    episode.take(turn([4, 5, 6], first), Said())
    episode.go_on([], [7, 8], 100)
    episode.take(turn([9, 10], second), Said())
    np.testing.assert_array_equal(episode.routing, np.concatenate([first, second[5:]]))
    assert len(episode.prompt) + len(episode.token_ids) - 1 == len(episode.routing)


def test_rows_have_the_experts_where_the_token_goes_in():
    rng = np.random.default_rng(0)
    routing = [rng.integers(0, 300, (length, 3, 2)) for length in (4, 6)]
    answer = {"temperature": 1.0, "counts": 1, "advantage": 0.5, "kept": None}
    made = [
        {"environment": name, "prompt_ids": prompt, "answers": [answer | {
            "token_ids": [5] * (len(told) + 1 - len(prompt)), "drawn": [1] * (len(told) + 1 - len(prompt)),
            "log_probs": [0.0] * (len(told) + 1 - len(prompt)), "routing": encoded_routing(told),
        }]}
        for name, prompt, told in zip(("b", "a"), ([1, 2, 3], [1]), routing, strict=True)
    ]  # fmt: skip
    batch = arrays(json.loads(json.dumps(made)), 8, None, routing=(3, 2), environments=("a", "b"))
    assert batch["routing"].shape == (2, 8, 3, 2) and batch["environment"].tolist() == [1, 0]
    for row, told in enumerate(routing):
        np.testing.assert_array_equal(batch["routing"][row, : len(told)], told)
        assert (batch["routing"][row, len(told) :] == -1).all() and batch["segment_ids"][row].sum() == len(told)
    assert encoded_routing(None) is None and not {"routing", "environment"} & arrays(made, 8, None).keys()
