"""What several hosts have of a batch of reinforcement learning, and what they read of what others had."""

import types

import numpy as np
import pytest
from test_rl_parts import record

from experiments.rl import batches
from experiments.rl.evaluation import HeldOutProblems
from experiments.rl.records import Files
from experiments.rl.settings import EvaluationConfig, RolloutsConfig
from lfm_jax.training import step


@pytest.mark.parametrize("part", [0, 1])
def test_each_answer_gets_its_own_log_probs_where_the_rows_of_hosts_interleave(monkeypatch, tmp_path, part):
    """Two hosts with two prompts each: of four shards of the global batch the first one's are 0 and 3."""
    monkeypatch.setattr(step, "_parts", lambda mesh: (part, [(0, 3), (1, 2)]))
    monkeypatch.setattr(batches, "place_batch", lambda batch, mesh: batch)
    placed = np.array([0, 1, 4, 5, 6, 7, 2, 3], np.float32)  # of two answers to each prompt
    trainer = batches.Trainer(
        mesh=None, log_probs=lambda params, buffers, batch: np.tile(placed[:, None] + params, 16), needs_old=True,
        reference=(100, None), model=types.SimpleNamespace(vocab_size=8, routing_shape=None), replay_routing=False,
        environments=(),
    )  # fmt: skip
    made = batches.RolloutBatches(
        tmp_path, None, None, None, trainer, total=1, kept_states=1, seed=0, rewards=None, advantages=None, watching=None,
        rollouts=RolloutsConfig(prompts=4, temperatures=((1.0, 2),), max_new_tokens=8, seq_len=16),
    )  # fmt: skip
    of_slot = lambda slot: record(slot) | {"seq": 16, "answers": [record()["answers"][0] for _ in range(2)]}
    made._now = batches._Made([of_slot(slot) for slot in (2 * part, 2 * part + 1)], {})
    made._add_log_probs(0, None)
    answers = [answer for each in made._now.records for answer in each["answers"]]
    assert [answer["old_log_probs"] for answer in answers] == [[row] * 6 for row in range(4 * part, 4 * part + 4)]
    assert [answer["reference_log_probs"] for answer in answers] == [[100 + row] * 6 for row in range(4 * part, 4 * part + 4)]


@pytest.mark.parametrize("before, now, order", [(2, 4, 1), (4, 2, -1)])
def test_hosts_of_another_number_replace_nothing_that_others_have_yet_to_read(tmp_path, before, now, order):
    wrote, read = ([Files(tmp_path, (part, parts)) for part in range(parts)] for parts in (before, now))
    records = [record(slot) for slot in range(8)]
    for part, files in enumerate(wrote):
        files.write(1, records[8 // before * part :][: 8 // before])
    for part in range(now)[::order]:
        slots = range(8 // now * part, 8 // now * (part + 1))
        assert read[part].read(1, slots, before) == [records[slot] for slot in slots]


def test_files_from_before_the_number_of_hosts_was_in_their_names_are_read(tmp_path):
    for part in range(2):
        Files(tmp_path, (part, 2)).write(1, [record(2 * part), record(2 * part + 1)])
        (tmp_path / "rollouts" / f"000001-{part}-of-2.jsonl").rename(tmp_path / "rollouts" / f"000001-{part}.jsonl")
    assert Files(tmp_path, (0, 4)).read(1, range(4), 2) == [record(slot) for slot in range(4)]


def test_each_difficulty_is_held_out_of_the_seeds_from_0_on(monkeypatch):
    monkeypatch.setattr(step, "_parts", lambda mesh: (0, [(0,)]))
    asked, told = [], {"parts": {"correct": 1.0}, "ending": "ended", "tokens": 3}
    maker = types.SimpleNamespace(held_out=lambda wanted: asked.extend(wanted) or [told] * len(wanted))
    config = EvaluationConfig(problems=5, difficulties=(1, 2), temperatures=(0.5,))
    HeldOutProblems(config, maker, None, {"a": 1}, (), None)._answers()
    assert asked == [("a", number, number // 2, 1 + number % 2, 0.5) for number in range(5)]
