"""Pairs against the rule written out, and the whole run of a tiny model: killed and started again, it is the same."""

import itertools
import json
import random
import threading

import jax
import numpy as np
import pytest

import run
from data_pipelines import Document, TokenizerConfig, train_tokenizer
from data_pipelines.conversations import CHAT_FORMATS, Conversation, ConversationEncoder
from experiments import preference_data
from experiments.json_lines import read_lines
from experiments.judges import JuryConfig, make_jury
from experiments.preference_data import Config, PairConfig, loops
from experiments.preference_data.loops import looping_place, loops_of
from experiments.preference_data.pairs import Candidate, Choice, choose_pair, combined
from experiments.stages import load_stage, mesh_for
from lfm_jax.interop import export_folder
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig

MODEL = ModelConfig(
    vocab_size=336, embed_dim=32, layer_types=("full_attention",), num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64,
    context_length=512,
)  # fmt: skip
LIMITS = {"acceptable": 0.75, "min_margin": 0.25, "min_agreement": 0.5}


def expected(candidates, scores, rule):
    """By all pairs: the one that no other beats."""
    totals, count = combined(scores), range(len(candidates))
    loops = [i for i in count if candidates[i].loops and rule == "loop_first"]
    best = [
        (totals[c], -c, bool(loops), -(totals[r] if totals[r] is not None else -1), r, c)
        for c, r in itertools.permutations(count, 2)
        if totals[c] is not None and c not in loops and (r in loops if loops else totals[r] is not None)
    ]
    if not best:
        return "all_loop" if len(loops) == len(candidates) else "unscored"
    _, _, _, _, r, c = max(best)
    if not candidates[c].ended:
        return "unfinished"
    if candidates[c].right is not True and (candidates[c].acceptable or 0) < 0.75:
        return "not_acceptable"
    if candidates[c].text == candidates[r].text:
        return "equal"
    if not loops and totals[c] - totals[r] < 0.25:
        return "small_margin"
    known = [(each[c], each[r]) for each in scores.values() if each[c] is not None and each[r] is not None]
    if not loops and len([1 for a, b in known if a > b]) < len(known) / 2:
        return "disagreement"
    return c, r


@pytest.mark.parametrize("rule", ["loop_first", "score"])
def test_pairs_are_those_of_the_rule_written_out(rule):
    draws, seen = random.Random(0), set()
    for _ in range(8000):
        size = draws.choice((2, 3, 6))
        candidates = [
            Candidate(draws.choice("abcdefgh"), draws.random() < 0.8, draws.random() < draws.choice((0.1, 0.8)),
                      draws.choice((True, False, None)), draws.choice((None, 0.0, 0.8)))
            for _ in range(size)
        ]  # fmt: skip
        judged = {name: [draws.choice((None, 0, 1, 2, 3)) for _ in range(size)] for name in "xyzw"[: draws.randint(1, 4)]}
        found, wanted = choose_pair(candidates, judged, rule, **LIMITS), expected(candidates, judged, rule)
        assert found == (Choice(*wanted, "pair") if isinstance(wanted, tuple) else Choice(None, None, wanted))
        seen.add(found.outcome)
    every = {"pair", "unscored", "all_loop", "unfinished", "not_acceptable", "equal", "small_margin", "disagreement"}
    assert seen == (every if rule == "loop_first" else every - {"all_loop"})


def test_a_loop_is_rejected_first_even_the_one_that_is_scored_highest():
    candidates = [Candidate(text, True, text == "b", True, None) for text in "abc"]
    judged = {"x": [2, 3, 1]}
    assert choose_pair(candidates, judged, "loop_first", **LIMITS) == (0, 1, "pair")
    assert choose_pair(candidates, judged, "score", **LIMITS) == (1, 2, "pair")
    assert choose_pair(candidates, {}, "score", **LIMITS).outcome == "unscored"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    text = "What is 3 + 4? Answer: 7\nSo did the cat. " * 50
    train_tokenizer(TokenizerConfig(vocab_size=330), [Document(text, "a")], folder / "tokenizer")
    params, buffers = functional(lambda rngs: Decoder(MODEL, rngs=rngs)).init(jax.random.key(1))  # its greedy answers loop
    export_folder(MODEL, params, buffers, folder / "model", tokenizer=folder / "tokenizer")
    talk = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "did"}]
    talks = [[*talk, {"role": "user", "content": f"{number}?"}, talk[1]] for number in range(4)]
    (folder / "talk.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in talks))
    return folder


def make(folder, workdir, **changes):
    settings = {
        "init_from": f"{folder}/model", "tasks": "arithmetic", "prompts": 4, "difficulties": "1",
        "shard_size": 3, "temperature": 5.0, "conversations": f"{folder}/talk.jsonl", "held_out_share": 0.0,
        "max_new_tokens": 48, "pairs.acceptable": 0.0,
        "judges.likelihoods": f"{folder}/model",
    } | changes  # fmt: skip
    command = ["--config=configs/preference_data.py", f"--workdir={workdir}"]
    return run.main([*command, *(f"--config.{name}={value}" for name, value in settings.items() if value is not None)])


def contents(workdir):
    texts = lambda kind: "".join(path.read_text() for path in sorted((workdir / kind).glob("*.jsonl")))
    lines = lambda kind: [json.loads(line) for line in texts(kind).split("\n") if line]
    return lines("rollouts"), lines("pairs")


@pytest.fixture(scope="module")
def made(folder):
    assert make(folder, folder / "run") == 0
    return folder / "run"


def test_everything_is_there_to_be_audited(made):
    rollouts, pairs = contents(made)
    figures = json.loads((made / "results.json").read_text())
    assert [record["number"] for record in rollouts] == list(range(8)) and figures["prompts"] == 8
    assert rollouts[-1]["messages"][-1] == {"role": "user", "content": "3?"} and len(rollouts[-1]["messages"]) == 3
    with_pair = [record for record in rollouts if record["choice"]["outcome"] == "pair"]
    assert len(pairs) == len(with_pair) == figures["pairs"] == figures["rules"]["loop_first"]["pairs"] > 0
    for record, pair in zip(with_pair, pairs, strict=True):
        texts = [record["responses"][record["choice"][side]]["text"] for side in ("chosen", "rejected")]
        assert [pair[side] for side in ("chosen", "rejected")] == [[{"role": "assistant", "content": text}] for text in texts]
        assert pair["prompt"] == record["messages"]
    answers = [answer for record in rollouts for answer in record["responses"]]
    assert [answer["kind"] for answer in answers[:6]] == ["sampled"] * 5 + ["greedy"]
    assert len({answer["seed"] for answer in answers if answer["kind"] == "sampled"}) == 40
    assert figures["tail_loop_share"] == sum(answer["ending"] == "tail_loop" for answer in answers) / 48
    assert figures["limit_share_greedy"] == sum(a["ending"] == "limit" and a["kind"] == "greedy" for a in answers) / 8
    assert all(sum(rule["dropped"].values()) + rule["pairs"] == 8 for rule in figures["rules"].values())


def test_a_likelihood_is_that_of_a_plain_forward_pass(folder):
    name = f"{folder}/model"
    (judge,) = make_jury(JuryConfig(likelihoods=(name,)), ComputeConfig(), MeshConfig())
    prompt, answers = Conversation([{"role": "user", "content": "3 + 4?"}]), ["7", "So did the cat."]
    stage = load_stage(name, ComputeConfig(), mesh_for(MeshConfig()))
    model, end = stage.functions.bind(stage.params, stage.buffers), stage.tokenizer.symbol_id("<|im_end|>")
    asked = ConversationEncoder(stage.tokenizer, CHAT_FORMATS["lfm2"]).prompts([prompt])[0].tolist()
    for answer, opinion in zip(answers, judge.score(prompt, answers), strict=True):
        said = [*stage.tokenizer.encode(answer), end]
        hidden = model(np.array([asked + said], np.int32)[:, :-1]).hidden
        log_probs = np.asarray(jax.nn.log_softmax(model.logits(hidden)[0]))[-len(said) :]
        assert opinion.score == pytest.approx(log_probs[np.arange(len(said)), said].mean(), abs=1e-4)
    assert judge.score(prompt, ["7", "cat " * 2000])[1].score is None
    # The program takes the parameters, and has none within it: with others, the same program says what those do.
    judge._stage = stage._replace(params=jax.tree.map(np.zeros_like, stage.params))
    assert judge.score(prompt, ["7"])[0].score == pytest.approx(-np.log(MODEL.vocab_size), abs=1e-5)


def test_the_policy_answers_the_next_shard_while_one_is_judged(folder, made, monkeypatch):
    """By judges that need none of its devices; the answers are the same, and the shards come in order."""
    asked, order, ask = [threading.Event() for _ in range(3)], [], preference_data._Policy.answer
    judge, seen = preference_data._judge_shard, []

    def answers(policy, prompts):
        asked[len(seen)].set()
        seen.append(len(order))
        return ask(policy, prompts)

    def judges(config, workdir, name, *rest):
        assert int(name) == 2 or asked[int(name) + 1].wait(120), "nobody asked the policy meanwhile"
        judge(config, workdir, name, *rest)
        order.append(name)

    monkeypatch.setattr(preference_data._Policy, "answer", answers)
    monkeypatch.setattr(preference_data, "_judge_shard", judges)
    assert make(folder, folder / "overlapping", **{"judges.likelihoods": None}) == 0
    assert order == ["000000", "000001", "000002"] and seen == [0, 0, 1], "it is one shard ahead, and no more"
    told = lambda workdir: [[answer["text"] for answer in record["responses"]] for record in contents(workdir)[0]]
    assert told(folder / "overlapping") == told(folder / "run")


def test_killed_and_started_again_it_is_the_same(folder, made, monkeypatch, capsys):
    written, write = [], preference_data.write_lines

    def dies(path, records):
        written.append(path.name)
        if len(written) == 4:  # the pairs of the second shard: its rollouts are there
            raise KeyboardInterrupt
        write(path, records)

    monkeypatch.setattr(preference_data, "write_lines", dies)
    with pytest.raises(KeyboardInterrupt):
        make(folder, folder / "again")
    assert len(list((folder / "again" / "counts").iterdir())) == 1
    assert make(folder, folder / "again") == 0
    assert written == [f"{number:06d}.jsonl" for number in (0, 0, 1, 1, 1, 1, 2, 2)]
    assert contents(folder / "again") == contents(made)
    with (folder / "talk.jsonl").open("a") as file:
        file.write((folder / "talk.jsonl").read_text().splitlines()[0] + "\n")
    assert make(folder, folder / "again") == 2
    assert "was made with another prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "nothing is asked"),
        ({"tasks": ("a",), "samples": 1, "greedy": False}, "a pair needs two answers to a prompt"),
        ({"tasks": ("a",), "temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"conversations": ("a",)}, "somebody must say what is acceptable"),
    ],
)
def test_mistakes_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(init_from="a", **changes)
    with pytest.raises(ValueError, match="min_margin must be from 0 to 1, got 2"):
        PairConfig(min_margin=2)


@pytest.mark.parametrize(
    "tokens, place",
    [
        ([1, 2, 3, *[7, 8, 9] * 30], 6),
        ([*[7] * 70, 1, 2], 1),
        ([1, 2, *[5] * 16], 3),
        ([3, *[4, 5] * 8], 3),
        ([1, 2, *[5] * 16, 6], None),
        ([9, 8, *[1, 2, 3] * 25, 4, *[6] * 100], 5),
        (range(200), None),
    ],
    ids=["inner", "escaped", "short tail", "tail of two", "short and escaped", "the first of two", "none"],
)
def test_a_loop_is_left_where_its_second_repetition_begins(tokens, place):
    found = looping_place(list(tokens))
    assert (found and found[1]) == place


def test_a_place_that_several_answers_have_is_recorded_once():
    answer = lambda tokens, kind, seed: {"token_ids": tokens, "kind": kind, "seed": seed}
    looping = [1, 2, *[5] * 16]
    answers = [answer(looping, "sampled", 3), answer([1, 2], "sampled", 4), answer([*looping, 5, 5], "greedy", 0)]
    (found,) = loops_of({"prompt_ids": [8, 9], "responses": answers})
    assert found == {
        "responses": [0, 2], "kinds": ["sampled", "greedy"], "seeds": [3, 0], "loop": {"start": 2, "end": 18, "period": 1},
        "prefix_ids": (8, 9, 1, 2, 5), "rejected": 5,
    }  # fmt: skip


def log_probs_behind(folder, prefixes):
    """Of the token behind each, [prefixes, vocab], from one pass over whole sequences."""
    stage = load_stage(f"{folder}/model", ComputeConfig(), mesh_for(MeshConfig()))
    tokens = np.zeros((len(prefixes), 256), np.int32)
    for row, prefix in enumerate(prefixes):
        tokens[row, : len(prefix)] = prefix

    @jax.jit
    def every(params, tokens):
        model = stage.functions.bind(params, stage.buffers)
        return jax.nn.log_softmax(model.logits(model(tokens).hidden))

    return np.asarray(every(stage.params, tokens))[np.arange(len(prefixes)), [len(prefix) - 1 for prefix in prefixes]]


def look(folder, workdir, **changes):
    settings = {"init_from": f"{folder}/model", "rollouts": folder / "run"} | changes
    command = ["--config=configs/preference_data.py:loops", f"--workdir={workdir}"]
    return run.main([*command, *(f"--config.{name}={value}" for name, value in settings.items())])


def looked(workdir):
    return [record for path in sorted((workdir / "loops").iterdir()) for record in read_lines(path)]


@pytest.fixture(scope="module")
def places(folder, made):
    assert look(folder, folder / "loops") == 0
    return looked(folder / "loops")


def test_each_looping_answer_has_a_record_with_what_the_policy_would_as_soon_say(folder, made, places):
    rollouts = {record["number"]: record for record in contents(made)[0]}
    looping = [(n, i) for n, each in rollouts.items() for i, a in enumerate(each["responses"]) if a["ending"].endswith("_loop")]
    assert sorted((pair["number"], i) for pair in places for i in pair["responses"]) == looping and len(places) > 4
    log_probs = log_probs_behind(folder, [pair["prefix_ids"] for pair in places])
    for pair, row in zip(places, log_probs, strict=True):
        record = rollouts[pair["number"]]
        answer, start = record["responses"][pair["responses"][0]], len(record["prompt_ids"])
        said, (begin, _, period) = answer["token_ids"], pair["loop"].values()
        assert pair["prefix_ids"] == [*record["prompt_ids"], *said[: begin + period]] and pair["messages"] == record["messages"]
        assert said[begin + period] == pair["rejected"]["token"] == said[begin], "it begins the second repetition"
        assert said[begin : begin + 3 * period] == said[begin + period : begin + 4 * period] and start < len(pair["prefix_ids"])
        # What fills up and begins texts; and what is no id of the tokenizer is not told at all.
        never = (0, 1, pair["rejected"]["token"])
        likely = [token for token in np.argsort(-row[:330])[:20].tolist() if token not in never and row[token] >= np.log(1e-3)]
        assert [each["token"] for each in pair["chosen"]] == likely
        for each in [pair["rejected"], *pair["chosen"]]:
            assert each["log_prob"] == pytest.approx(row[each["token"]], abs=1e-3)
    figures = json.loads((folder / "loops" / "results.json").read_text())
    assert figures["pairs"] == figures["places"] == len(places) and figures["loop_share"] == len(looping) / 48
    assert sum(each["pairs"] for each in figures["rejected"]) == len(places)


def test_looking_that_was_killed_goes_on_and_other_answers_are_refused(folder, made, places, monkeypatch, capsys):
    write, written = loops.write_json, []

    def dies(path, content):
        written.append(path.name)
        if len(written) == 2:  # the lines of the second shard are there
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(loops, "write_json", dies)
    with pytest.raises(KeyboardInterrupt):
        look(folder, folder / "looking")
    assert look(folder, folder / "looking") == 0
    assert written == [f"{number:06d}.json" for number in (0, 1, 1, 2)] and looked(folder / "looking") == places
    assert json.loads((folder / "looking" / "results.json").read_text())["pairs"] == len(places)
    path = made / "rollouts" / "000001.jsonl"
    text = path.read_text()
    path.write_text(text + "\n")
    try:
        assert look(folder, folder / "looking") == 2
    finally:
        path.write_text(text)
    assert "was made with another rollouts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"alternatives": 21}, "alternatives must be in 1..20, which the engine tells, got 21"),
        ({"min_probability": 1.0}, "min_probability must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_alternatives_that_there_are_not_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        loops.Config(init_from="a", rollouts="b", **changes)


def test_a_policy_that_reads_other_ids_is_not_asked(folder, made, tmp_path, capsys):
    assert look(folder, tmp_path / "none", rollouts=tmp_path) == 2
    assert "no shard of rollouts is there" in capsys.readouterr().err
    text = "Another text, of other words. " * 50
    train_tokenizer(TokenizerConfig(vocab_size=320), [Document(text, "a")], tmp_path / "tokenizer")
    model = functional(lambda rngs: Decoder(MODEL, rngs=rngs)).init(jax.random.key(1))
    export_folder(MODEL, *model, tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    assert look(folder, tmp_path / "pairs", init_from=tmp_path / "model") == 2
    assert "its tokenizer does not read answer" in capsys.readouterr().err
