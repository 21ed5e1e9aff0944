"""Conversations of the problems of a file, and tasks whose files would be one."""

import json

import pytest
from etils import epath

from data_pipelines.tasks import task_named
from experiments import task_data
from experiments.preference_data.prompts import Source, shards
from experiments.task_data import Config


@pytest.fixture
def names(tmp_path):
    """Two files of GSM8K, each with problems of one and of two calculations."""
    for name in ("train", "test"):
        lines = [
            {"question": f"{number} or {steps} of {name}?", "answer": f"{'<<1+1=2>>' * steps}2\n#### 2"}
            for number in range(40) for steps in (1, 2)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"gsm8k:{tmp_path / name}.jsonl" for name in ("train", "test")]


def test_problems_of_a_file_all_come_before_one_comes_again(names, tmp_path):
    """In files to be fine-tuned on, and in what a policy is asked."""
    (tmp_path / "run").mkdir()
    task_data.main(Config(tasks=(names[0],), conversations=60, difficulties=(1, 2)), epath.Path(tmp_path / "run"))
    records = [json.loads(line) for line in (tmp_path / "run" / "conversations" / "gsm8k.jsonl").read_text().splitlines()]
    assert len({record["messages"][0]["content"] for record in records}) == len(records) == 60
    for record in records:
        problem = task_named(names[0]).sample(record["seed"], record["difficulty"], "train")
        assert record["messages"][:-1] == problem.messages
    source = Source([names[0]], 60, (1, 2), (), 0.0, "train", 0)
    asked = [prompt for shard in shards(source, 32) for prompt in shard]
    assert [prompt.conversation.messages for prompt in asked] == [record["messages"][:-1] for record in records]
    assert [prompt.about["seed"] for prompt in asked] == [number // 2 for number in range(60)]


def test_two_tasks_of_one_name_are_refused(names, tmp_path):
    with pytest.raises(ValueError, match="--config.tasks: two tasks have one name, of gsm8k, gsm8k; take one of them"):
        task_data.main(Config(tasks=tuple(names), difficulties=(1, 2)), epath.Path(tmp_path))
