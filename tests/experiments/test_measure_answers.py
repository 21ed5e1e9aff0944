"""Intervals against SciPy's, figures against answers counted by hand, and a whole measurement of a tiny model."""

import json
import types

import jax
import pytest
import scipy.stats
from etils import epath

from data_pipelines import Document, TokenizerConfig, train_tokenizer
from data_pipelines.tasks import task_named
from experiments import measure_answers
from experiments.measure_answers import Config, markdown, measure, wilson
from lfm_jax.generation import Completion
from lfm_jax.interop import export_folder
from lfm_jax.models import Decoder, ModelConfig, functional

MODEL = ModelConfig(
    vocab_size=336, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64,
    context_length=128,
)  # fmt: skip


def test_the_interval_is_that_of_scipy():
    for of in (1, 2, 7, 100, 768):
        for count in {0, 1, of // 3, of - 1, of}:
            expected = scipy.stats.binomtest(count, of).proportion_ci(0.95, method="wilson")
            assert wilson(count, of) == pytest.approx((expected.low, expected.high), abs=1e-12)
    for count, of in ((0, 0), (2, 1), (-1, 3)):
        with pytest.raises(ValueError, match=f"an interval needs trials, and at most as many successes, got {count} of {of}"):
            wilson(count, of)


def told(temperature, ending, right, tokens, inner=False, task="a"):
    return {
        "task": task, "temperature": temperature, "ending": ending, "right": right, "tokens": tokens, "inner_loop": inner,
        "repetition": tokens / 100,
    }  # fmt: skip


def test_figures_are_those_counted_by_hand():
    rows = measure([
        told(0.0, "tail_loop", False, 40, inner=True), told(0.0, "tail_loop", False, 40), told(0.0, "inner_loop", True, 30, True),
        told(0.0, "limit", False, 40), told(0.6, "ended", True, 10), told(0.0, "ended", True, 20),
        told(0.0, "ended", None, 10, task="b"),
    ])  # fmt: skip
    greedy, drawn, other = rows
    assert [(row["task"], row["temperature"], row["answers"]) for row in rows] == [("a", 0.0, 5), ("a", 0.6, 1), ("b", 0.0, 1)]
    counts = {name: greedy[f"{name}_count"] for name in ("tail_loop", "inner_loop", "limit", "right")}
    assert counts == {"tail_loop": 2, "inner_loop": 2, "limit": 1, "right": 2}
    assert (greedy["tail_loop_low"], greedy["tail_loop_high"]) == wilson(2, 5) and greedy["tail_loop_share"] == 0.4
    assert (greedy["mean_tokens"], greedy["mean_tokens_right"], greedy["repetition"]) == pytest.approx((34, 25, 0.34))
    assert (drawn["right_share"], drawn["tail_loop_share"], drawn["mean_tokens_right"]) == (1, 0, 10)
    assert [other[f"right_{name}"] for name in ("count", "share", "low", "high")] == [0, None, None, None]
    table = markdown(rows).splitlines()
    two_of_five = "40.0 % (11.8 to 76.9)"
    assert table[2] == f"| a | 0 | {two_of_five} | {two_of_five} | 20.0 % (3.6 to 62.4) | {two_of_five} | 34 | 25 | 0.34 |"
    assert " – | 10 | – | 0.10 |" in table[4]


def test_each_problem_of_a_file_is_asked_once(tmp_path):
    """However many are asked for; and of each difficulty as many different ones as are, if there are as many."""
    lines = [
        {"question": f"{number} or {steps}?", "answer": f"{'<<1+1=2>>' * steps}2\n#### 2"}
        for number in range(40) for steps in (1, 2)
    ]  # fmt: skip
    (tmp_path / "file.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = lambda count: [
        question.conversation.messages[0]["content"].splitlines()[0]
        for question in measure_answers.questions((f"gsm8k:{tmp_path / 'file.jsonl'}",), count, (1, 2), "train", 0)
    ]
    every = asked(1000)
    assert len(set(every)) == len(every) and set(every) < {line["question"] for line in lines} and len(every) > 60
    some = asked(60)
    assert len(some) == 60 and sum(each.endswith("1?") for each in some) == 30


def test_what_is_right_is_what_the_task_holds_for_right():
    """Of a model that solves every second problem; one answer was stopped for looping, another looped and went on."""
    asked = measure_answers.questions(("numbers_game",), 4, (2,), "held_out", 0)
    solved = [task_named("numbers_game").sample(seed, 2, "held_out").solution for seed in range(4)]
    texts = [text if number % 2 == 0 else text.replace("yes", "low") for number, text in enumerate(solved)]
    drawn = [[0], [1], [2, *[9] * 64, *range(40)], [3]]
    endings = ["ended", "inner_loop", "ended", "ended"]
    answerer = types.SimpleNamespace(
        prompts=lambda conversations, most: [(1,)] * len(conversations),
        request=lambda prompt, sampling: prompt,
        engine=types.SimpleNamespace(run=lambda requests: [Completion(tokens, [], [], "", "stop") for tokens in drawn]),
        told=lambda completion: {"text": texts[completion.tokens[0]], "ending": endings[completion.tokens[0]]},
    )
    found = measure_answers.answer(answerer, asked, (0.0,), 8, 0)
    assert [each["right"] for each in found] == [True, False, True, False]
    assert [each["inner_loop"] for each in found] == [False, True, True, False]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    text = "".join(task_named("numbers_game").rough_text(seed, 1) + "\n" for seed in range(200))
    train_tokenizer(TokenizerConfig(vocab_size=300), [Document(text, "a")], folder / "tokenizer")
    params, buffers = functional(lambda rngs: Decoder(MODEL, rngs=rngs)).init(jax.random.key(0))
    export_folder(MODEL, params, buffers, folder / "model", tokenizer=folder / "tokenizer")
    return str(folder / "model")


def run(model, workdir, **changes):
    settings = {"tasks": ("numbers_game",), "problems": 4, "temperatures": (0.0, 0.6), "max_new_tokens": 24} | changes
    workdir.mkdir()
    measure_answers.main(Config(init_from=model, **settings), epath.Path(workdir))
    answers = [json.loads(line) for line in (workdir / "answers.jsonl").read_text().splitlines()]
    return answers, json.loads((workdir / "results.json").read_text())


def test_a_measurement_of_a_model(model, tmp_path):
    """Each problem once at each temperature, from the held-out split; greedy answers and draws alike follow from the seed."""
    answers, results = run(model, tmp_path / "first")
    assert [(each["number"], each["temperature"]) for each in answers] == [(n, t) for n in range(4) for t in (0.0, 0.6)]
    assert (results["rows"], results["problems"], results["answers"]) == (measure(answers), 4, 8)
    assert (tmp_path / "first" / "answers.md").exists()
    assert max(each["tokens"] for each in answers) <= 24
    # Asked alone, at other temperatures beside it, an answer is the same; under another seed the problem is another one.
    (greedy, drawn, _), _ = run(model, tmp_path / "alone", problems=1, temperatures=(0.0, 0.6, 0.1))
    assert (greedy["token_ids"], drawn["token_ids"]) == (answers[0]["token_ids"], answers[1]["token_ids"])
    asked = lambda seed: measure_answers.questions(("numbers_game",), 3, (2,), "held_out", seed)
    assert [question.conversation.messages for question in asked(0)] == [
        task_named("numbers_game").sample(seed, 2, "held_out").messages for seed in range(3)
    ]
    assert asked(1)[0].reference == asked(0)[1].reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "give at least one task, one problem and one temperature, got"),
        ({"problems": 0}, "got .*'numbers_game'.*, 0 and"),
        ({"temperatures": (-1.0,)}, "temperature must not be negative, got -1.0"),
        ({"tasks": ("numbers_gme",)}, "--config.tasks or difficulties: no task is named 'numbers_gme'; did you mean"),
        ({"tasks": ("numbers_game",) * 2}, "two tasks have one name, of numbers_game, numbers_game; take one of them"),
        ({"difficulties": (7,)}, "numbers_game has difficulties 1 to 2, got 7"),
        ({"max_new_tokens": 200}, "--config.tasks or max_new_tokens: too_long: .* in a context of 128"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path / "refused", **change)
