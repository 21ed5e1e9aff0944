"""What a cold environment is started with, and with which settings the two stages after it run."""

import dataclasses
import json

import pytest
from etils import epath

import run
from data_pipelines import LoaderConfig
from data_pipelines.conversations import ConversationsConfig, read_conversations
from data_pipelines.tasks import Shop, task_named
from experiments import cold_start, pretrain, rl, sft
from experiments.cold_start import Config
from experiments.results import write_json, write_results
from experiments.rl.settings import EnvironmentsConfig, RolloutsConfig
from lfm_jax.configuration import to_mapping
from lfm_jax.training import TrainConfig

LOADER, TRAIN = LoaderConfig(seq_len=64, batch_size=8), TrainConfig(steps=4)
COLD = {"difficulty": 2, "verdict": "absent", "prompts": [{"solved": None, "tools": None}]}
_SAID = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in "ab"]
ONE = COLD | {"prompts": [{"solved": chat, "tools": None} for chat in _SAID]}  # two answers to one question


@pytest.fixture
def cold(tmp_path):
    """The workdir of a run that has two environments, of which `cold` is what it says of them."""

    def make(names=("word_problems", "arithmetic"), **found):
        config = rl.Config(
            init_from="first", train=TrainConfig(steps=9), environments=EnvironmentsConfig(names=names),
            rollouts=RolloutsConfig(chat_format="lfm2_5"),
        )  # fmt: skip
        write_json(epath.Path(tmp_path) / "config.json", {"experiment": "rl", "invocation": {}, **to_mapping(config)})
        write_json(epath.Path(tmp_path) / "cold.json", {"environments": found})
        return tmp_path

    return make


@pytest.fixture
def stages(monkeypatch):
    """Stands for the stages: (name, settings, workdir) of each that was run. Reinforcement learning from nothing is cold."""
    ran = []

    def stage(module, figures):
        def main(config, workdir):
            ran.append((module, config, workdir))
            is_first = workdir.name == "first_rl"
            if is_first:
                write_json(workdir / "cold.json", {"environments": {"numbers_game": COLD}})
            write_results(workdir, figures | ({"accuracy": 0.0} if is_first else {}), config)

        monkeypatch.setattr(module, "main", main)

    stage(pretrain, {})
    stage(sft, {"nll_per_token": 1.5})
    figures = {"accuracy": 0.75, "accuracy_before": 0.5, "tail_loop": 0.0, "accuracy_of_arithmetic": 0.875}
    figures |= {"accuracy_at_0.6": 0.25, "accuracy_at_0.6_before": 0.125, "answer_tokens_at_0.6": 9.0}
    stage(rl, figures | {"accuracy_of_arithmetic_before": 0.625, "accuracy_of_shop": 0.25, "accuracy_of_shop_before": 0.125})
    return ran


def start(folder, workdir, **changes):
    workdir.mkdir(exist_ok=True)
    cold_start.main(Config(run=str(folder), loader=LOADER, train=TRAIN, **changes), epath.Path(workdir))
    return json.loads((workdir / "results.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_its_problems_are_learnt_at_its_difficulty_and_then_practised(cold, stages, tmp_path):
    folder = cold(arithmetic=COLD)
    figures = start(folder, tmp_path / "again", conversations=5, rl_steps=3)
    examples = lines(tmp_path / "again" / "examples" / "arithmetic.jsonl")
    task = task_named("arithmetic")
    for seed, example in enumerate(examples):
        problem = task.sample(seed, 2, "train")
        assert example["messages"][:-1] == problem.messages and len(examples) == 5
        assert task.score(example["messages"][-1]["content"], problem.reference)["correct"] == 1
    (_, tuned, where), (_, after, last) = stages
    assert (tuned.init_from, where, last) == (str(folder), tmp_path / "again" / "sft", tmp_path / "again" / "rl")
    assert tuned.data.chat_format == "lfm2_5"
    assert tuned.data.sources == (str(tmp_path / "again" / "examples" / "arithmetic.jsonl"),)
    assert (after.init_from, after.train.steps, after.train.seed) == (str(tmp_path / "again" / "sft"), 3, 1)
    assert after.environments.difficulties == (1, 2) and after.environments.names == ("word_problems", "arithmetic")
    assert figures["environments"] == [
        {"environment": "arithmetic", "difficulty": 2, "verdict": "absent", "examples": 5, "accuracy_after_sft": 0.625,
         "accuracy_after_rl": 0.875, "is_cold": False}
    ]  # fmt: skip
    assert figures["cold"] == 1 and figures["cold_after"] == 0 and figures["sft_nll_per_token"] == 1.5
    start(folder, tmp_path / "again", conversations=5, rl_steps=3)
    assert len(stages) == 2  # what is there is not run again


def test_from_nothing_a_model_is_trained_and_asked_before(stages, tmp_path):
    command = ["--config=configs/cold_start.py:from_nothing", f"--workdir={tmp_path}", "--config.conversations=30"]
    assert run.main(command) == 0
    assert [(module, where.name) for module, _, where in stages] == [
        (pretrain, "pretrain"), (rl, "first_rl"), (sft, "sft"), (rl, "rl"),
    ]  # fmt: skip
    (_, _, base), (_, asked, where), (_, tuned, learnt), (_, after, _) = stages
    assert (asked.init_from, tuned.init_from, after.init_from) == (str(base), str(where), str(learnt))
    assert asked.environments.names == after.environments.names == ("numbers_game",)
    assert (asked.train.steps, asked.train.seed, after.train.steps, after.train.seed) == (8, 0, 100, 1)
    figures = json.loads((tmp_path / "results.json").read_text())
    assert [figures[f"accuracy_{when}"] for when in ("of_run", "after_sft", "after_rl")] == [0.0, 0.5, 0.75]
    assert [figures[f"accuracy_at_0.6_{when}"] for when in ("of_run", "after_sft", "after_rl")] == [0.25, 0.125, 0.25]
    assert not any("answer_tokens" in name or "before" in name for name in figures)
    assert run.main(command) == 0 and len(stages) == 4  # what is there is not run again


def test_the_shop_is_started_with_whole_episodes(cold, stages, tmp_path):
    folder = cold(names=("shop", "arithmetic"), shop=COLD)
    start(folder, tmp_path / "again", conversations=3)
    examples = lines(tmp_path / "again" / "examples" / "shop.jsonl")
    assert stages[1][1].train.steps == 9 and len(examples) == 3
    for seed, example in enumerate(examples):
        shop = Shop()
        problem = shop.reset(seed, 2, "train")
        for message in example["messages"][len(problem.messages) :]:
            if message["role"] == "assistant":
                shop.step(message["content"])
        assert shop.score()["correct"] == 1 and example["tools"] == problem.tools


def test_what_the_policy_got_right_is_taken_once_and_the_best_first(cold, stages, tmp_path):
    said = lambda text: [{"role": "assistant", "content": text}]
    asked, other = ([{"role": "user", "content": content}] for content in "?!")
    probe = [
        {"solved": [*asked, *said("probed")], "tools": None}, {"solved": [*other, *said("another")], "tools": None},
        {"solved": None, "tools": None},
    ]  # fmt: skip
    folder = cold(arithmetic=COLD | {"verdict": "rare", "prompts": probe})
    answer = lambda text, correct, reward: {"parts": {"correct": correct}, "reward": reward, "messages": said(text)}
    record = {"messages": asked, "tools": None, "answers": [answer("wrong", 0.0, 0.0), answer("probed", 1.0, 0.5)]}
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "000001.jsonl").write_text(
        json.dumps(record | {"environment": "arithmetic", "answers": [*record["answers"], answer("fair", 0.5, 0.4)]}) + "\n"
        + json.dumps(record | {"environment": "word_problems", "answers": [answer("other", 1.0, 1.0)]}) + "\n"
    )  # fmt: skip
    start(folder, tmp_path / "again", source="rollouts")
    examples = lines(tmp_path / "again" / "examples" / "arithmetic.jsonl")
    assert [example["messages"][-1]["content"] for example in examples] == ["probed", "another", "fair"]


def probed(*questions):
    """What is known of a cold environment whose probe was right once in each of these."""
    chats = [[{"role": "user", "content": each}, {"role": "assistant", "content": "So."}] for each in questions]
    return COLD | {"verdict": "rare", "prompts": [{"solved": chat, "tools": None} for chat in chats]}


@pytest.mark.parametrize("words", ["c d", "c d e", "f g h i j k"])
def test_of_few_questions_there_are_some_to_learn_and_some_to_measure(cold, stages, tmp_path, words):
    """In each environment; a share of 0.1, by the questions' hashes, would leave one split empty."""
    folder = cold(arithmetic=probed(*words.split()), word_problems=probed(*words.upper().split()))
    start(folder, tmp_path / "again", source="rollouts")
    data = stages[0][1].data
    for source in data.sources:
        where = ConversationsConfig(source=source, held_out_share=data.held_out_share)
        learnt, measured = (len(list(read_conversations(where, split))) for split in ("train", "held_out"))
        assert learnt + measured == len(words.split()) and learnt >= 1 and measured >= 1


def test_of_many_questions_a_tenth_is_measured(cold, stages, tmp_path):
    start(cold(arithmetic=COLD), tmp_path / "again", conversations=100)
    assert stages[0][1].data.held_out_share == 0.1


@pytest.mark.parametrize(
    "found, changes, message",
    [
        ({}, {}, "has no cold environment in cold.json; there is nothing to be started"),
        ({"arithmetic": COLD}, {"source": "rollouts"}, "0 of the answers in arithmetic that are kept were right"),
        ({"arithmetic": ONE}, {"source": "rollouts"}, "of so few different questions, 1, that all would be held out"),
    ],
)
def test_there_must_be_something_to_start_with(cold, stages, tmp_path, found, changes, message):
    with pytest.raises(ValueError, match=message):
        start(cold(**found), tmp_path / "again", **changes)


class Mute:
    """For TRL: nothing is known that solves it."""

    def reset(self, prompt):
        return None

    def get_reward(self):
        """None at all."""
        return 0.0


def test_an_environment_without_solutions_says_so(cold, stages, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{number}?"}) + "\n" for number in range(20)))
    folder = cold(names=(f"trl:{__name__}:Mute:{tmp_path / 'rows.jsonl'}",), Mute=COLD | {"difficulty": 1})
    with pytest.raises(ValueError, match="Mute has no worked solutions; take source=rollouts"):
        start(folder, tmp_path / "again")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conversations": 1}, "conversations must be at least 2, one of which is held out, got 1"),
        ({"run": None}, "give run, the workdir of a run that has gone cold, or else first"),
        ({"rl_steps": 0}, "rl_steps must be at least 1, or None, got 0"),
    ],
)
def test_mistakes_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Config(run="a", loader=LOADER, train=TRAIN), **changes)


def test_a_run_that_is_not_cold_is_told_to_the_user(cold, tmp_path, capsys):
    folder = cold()
    assert run.main(["--config=configs/cold_start.py", f"--workdir={tmp_path / 'again'}", f"--config.run={folder}"]) == 2
    assert "--config.run: " in capsys.readouterr().err
