"""Episodes token by token, rewards, advantages, curriculum and rows of reinforcement learning, against figures by hand."""

import itertools
import json
import math

import jax
import numpy as np
import pytest

from configs.rl import get_config
from data_pipelines import Document, TokenizerConfig, load_tokenizer, train_tokenizer
from data_pipelines.conversations import CHAT_FORMATS, Conversation, ConversationEncoder
from data_pipelines.tasks import Shop
from data_pipelines.tasks.shop import solve
from experiments.answering import Answerer
from experiments.rl import Config
from experiments.rl.curriculum import Curriculum, pass_at_k
from experiments.rl.environments import SingleTurn, source_named
from experiments.rl.episodes import Episode, answer_seed, following, play
from experiments.rl.figures import batch_figures, held_out_figures
from experiments.rl.making import probe_figures
from experiments.rl.records import Files, arrays, decoded_bits, encoded_bits, longest, with_log_probs
from experiments.rl.rewards import advantages_of, counts, rewards_of, token_advantages, varied
from experiments.rl.settings import (
    AdvantagesConfig,
    CurriculumConfig,
    EnvironmentsConfig,
    EvaluationConfig,
    RewardsConfig,
    RolloutsConfig,
)
from lfm_jax.configuration import from_mapping
from lfm_jax.generation import Completion, EngineConfig
from lfm_jax.training import PolicyGradientConfig, Rollouts, TrainConfig, policy_gradient_sums

ROLLOUTS = RolloutsConfig(max_new_tokens=300, seq_len=4000)


class Guess:
    """As TRL's users write them: a number is to be guessed."""

    def reset(self, prompt, number):
        self._number, self._guesses = number, []
        return " Guess it."

    def guess(self, number: int) -> str:
        """Says whether the number is lower, higher or right.

        Args:
            number: The guess.
        """
        self._guesses.append(number)
        return "right" if number == self._number else "lower" if self._number < number else "higher"

    def get_reward(self):
        """1 if the last guess was right."""
        return float(self._guesses[-1:] == [self._number])


class Scripted:
    """Stands for an engine that says what it is told to; keeps what it was asked."""

    def __init__(self, answers):
        self._answers, self.asked, self.context = iter(answers), [], ROLLOUTS.seq_len

    def run(self, requests):
        self.asked += requests
        found = [next(self._answers) for _ in requests]
        return [
            Completion(ids, [0.0] * len(ids), [], "", reason, [-float(each) for each in ids], None) for ids, reason in found
        ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl_parts")
    text = json.dumps([Shop().reset(seed, 1).messages for seed in range(3)]) + "What is 3 + 4? Answer: 7" * 20
    train_tokenizer(TokenizerConfig(vocab_size=400), [Document(text, "a")], folder / "tokenizer")
    return load_tokenizer(folder / "tokenizer")


def make_answerer(tokenizer, chat_format="lfm2"):
    """All of an `Answerer` but its engine, which says what the test gives it."""
    answerer = object.__new__(Answerer)
    answerer.encoder = ConversationEncoder(tokenizer, CHAT_FORMATS[chat_format])
    answerer._decode, answerer._symbols = tokenizer.decode, {index: name for name, index in answerer.encoder.symbols.items()}
    answerer.stop_ids = (tokenizer.symbol_id("<|im_end|>"), tokenizer.eos_id)
    answerer.engine = Scripted(())
    return answerer


def solved(seed):
    """A shop, its problem, the worked solution, and the turns of it that are the assistant's."""
    shop = Shop()
    chat = solve(shop, shop.reset(seed, 2))
    shop = Shop()
    problem = shop.reset(seed, 2)
    return shop, problem, chat, [message["content"] for message in chat if message["role"] == "assistant"]


def begun(answerer, shop, problem):
    (prompt,) = answerer.encoder.prompts([Conversation(problem.messages, problem.tools)])
    return Episode(shop, problem, prompt.tolist(), 1.0, (0, 1, 2))


@pytest.mark.parametrize("chat_format", ["lfm2", "lfm2_5"])
def test_an_episode_of_several_turns_has_the_ids_of_its_conversation(tokenizer, chat_format):
    shop, problem, chat, said = solved(3)
    answerer = make_answerer(tokenizer, chat_format)
    ((ids, trained),) = answerer.encoder.examples([Conversation(chat, problem.tools)])[0]
    of_all = itertools.groupby(zip(ids.tolist(), trained, strict=True), lambda each: each[1])
    runs = [[token for token, _ in group] for drawn, group in of_all if drawn]
    answerer.engine = Scripted([(run, "stop") for run in runs])
    episode = begun(answerer, shop, problem)
    play([episode], answerer, ROLLOUTS)
    assert len(said) == len(runs) > 2
    assert [*episode.prompt, *episode.token_ids] == ids.tolist()
    assert [False] * len(episode.prompt) + episode.drawn == trained.tolist()
    assert episode.messages == chat[len(problem.messages) :]
    assert episode.told()["parts"]["correct"] == 1 and episode.told()["turns"] == len(runs) and not episode.truncated
    assert episode.log_probs == [-float(token) for token, drawn in zip(episode.token_ids, episode.drawn, strict=True) if drawn]
    seeds = [request.sampling.seed for request in answerer.engine.asked]
    assert seeds == [answer_seed(0, 1, 2, turn) for turn in range(len(runs))] and len(set(seeds)) == len(runs)


def test_what_was_drawn_is_never_made_into_ids_again(tokenizer):
    """A letter at a time, as no tokenizer would do it: the tokens stay as they were drawn, and what follows them as it is."""
    shop, problem, chat, said = solved(3)
    answerer = make_answerer(tokenizer)
    symbols, end = answerer.encoder.symbols, tokenizer.symbol_id("<|im_end|>")

    def letters(text):
        pieces = answerer.encoder._pattern.split(text)
        return [token for piece in pieces for token in ([symbols[piece]] if piece in symbols else each_letter(piece))]

    each_letter = lambda piece: itertools.chain(*map(tokenizer.encode, piece))
    drawn = [[*letters(text), end] for text in said]
    answerer.engine = Scripted([(ids, "stop") for ids in drawn])
    episode = begun(answerer, shop, problem)
    play([episode], answerer, ROLLOUTS)
    for request, ids in zip(answerer.engine.asked, drawn, strict=True):
        place = len(request.prompt) - len(episode.prompt)
        assert episode.token_ids[place : place + len(ids)] == ids and all(episode.drawn[place : place + len(ids)])
        assert (*episode.prompt, *episode.token_ids)[: len(request.prompt)] == request.prompt
    assert sum(episode.drawn) == sum(map(len, drawn)) and episode.told()["parts"]["correct"] == 1
    whole = answerer.encoder.examples([Conversation(chat, problem.tools)])[0][0][0].tolist()[len(episode.prompt) :]
    assert answerer.text(episode.token_ids) == answerer.text(whole) and episode.token_ids != whole


@pytest.mark.parametrize("room, reason", [(0, "stop"), (400, "length"), (400, "loop")])
def test_an_episode_ends_at_a_limit_and_says_so(tokenizer, room, reason):
    """room: tokens that there are behind the first answer; none is too few for what the tool says."""
    shop, problem, _, said = solved(3)
    answerer = make_answerer(tokenizer)
    symbols = answerer.encoder.symbols
    ids = [symbols["<|tool_call_start|>"], *tokenizer.encode("[a()]"), symbols["<|tool_call_end|>"]]
    answerer.engine = Scripted([([*ids, answerer.stop_ids[0]], reason)])
    episode = begun(answerer, shop, problem)
    rollouts = RolloutsConfig(max_new_tokens=len(ids) + 1, seq_len=len(episode.prompt) + len(ids) + 1 + room)
    play([episode], answerer, rollouts)
    told = episode.told()
    assert episode.over and episode.truncated == (reason != "loop") and all(episode.drawn) and told["turns"] == 1
    assert told["ending"] == ("tail_loop" if reason == "loop" else "limit") and told["parts"]["correct"] == 0
    assert [request.sampling.max_new_tokens for request in answerer.engine.asked] == [len(ids) + 1]


@pytest.mark.parametrize("room", [0, 1])
def test_behind_what_a_tool_says_there_must_be_room_for_a_token(tokenizer, room):
    shop, problem, _, _ = solved(3)
    answerer = make_answerer(tokenizer)
    episode = begun(answerer, shop, problem)
    (ids,) = following(answerer, [(problem, episode.prompt, [{"role": "tool", "content": "a"}])])
    episode.go_on([{"role": "tool", "content": "a"}], ids, len(episode.prompt) + len(ids) + room)
    assert episode.over == episode.truncated == (room == 0) and len(episode.token_ids) == len(ids) * room
    if room:
        rollouts = RolloutsConfig(max_new_tokens=5, seq_len=len(episode.prompt) + len(ids) + 1)
        assert episode.request(answerer, rollouts).sampling.max_new_tokens == 1


def test_a_template_that_changes_what_was_said_before_is_refused(tokenizer):
    _, problem, _, _ = solved(3)
    answerer = make_answerer(tokenizer)
    with pytest.raises(ValueError, match="no episode of several turns can be learnt from with it"):
        following(answerer, [(problem, [1, 2, 3], [{"role": "tool", "content": "a"}])])


def test_requests_are_by_the_settings_alone(tokenizer):
    shop, problem, _, _ = solved(3)
    answerer = make_answerer(tokenizer)
    rollouts = RolloutsConfig(max_new_tokens=7, seq_len=4000, top_p=0.9, top_k=5, min_p=0.1, stop_at_loop=True)
    request = begun(answerer, shop, problem).request(answerer, rollouts)
    found = request.sampling
    assert (found.repetition_penalty, found.temperature, found.top_p, found.top_k, found.min_p) == (1.0, 1.0, 0.9, 5, 0.1)
    assert request.drawn and request.loop is not None and request.stop_ids == answerer.stop_ids
    greedy = rollouts.sampling(0.0, 7, 0)
    assert (greedy.top_p, greedy.top_k, greedy.min_p) == (1.0, 0, 0.0)  # learnt from as a draw among all tokens


ANSWER = {
    "token_ids": [5, 6, 5, 6, 9, 9, 5, 6], "drawn": [1, 1, 1, 1, 0, 0, 1, 1], "ending": "ended", "truncated": False,
    "parts": {"correct": 1.0, "format": 0.5, "calls": None},
}  # fmt: skip


def test_rewards_are_the_sum_of_their_parts():
    config = RewardsConfig(correct=2, other_parts=0.4, ngram=2, ngram_penalty=-1, loop_penalty=-0.7, overlong_buffer=4)
    found = rewards_of(config, ANSWER, [4, 2], 6)
    # Of the 2-grams 56 65 56 and 56, none of which reaches over the tool, two stood there before.
    assert found["rewards"] == {"correct": 2.0, "other_parts": 0.2, "ngram": -0.5, "loop": 0.0, "overlong": -0.5}
    assert found["reward"] == pytest.approx(1.2)
    looping = rewards_of(config, ANSWER | {"ending": "tail_loop"}, [2], 6)
    assert looping["rewards"]["loop"] == -0.7 and looping["rewards"]["overlong"] == 0
    unscored = rewards_of(config, ANSWER | {"parts": {"correct": None, "format": 1.0}}, [2], 6)
    assert unscored["reward"] is None and unscored["rewards"]["other_parts"] == 0.4
    assert rewards_of(RewardsConfig(), ANSWER, [2], 6)["rewards"].keys() == {"correct", "other_parts", "ngram", "loop"}


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_the_penalty_of_a_token_reaches_those_before_it(discount):
    config = RewardsConfig(ngram=2, ngram_token_penalty=-0.1, ngram_discount=discount)
    penalties = [0, 0, -0.1, -0.1, -0.1, -0.1]  # the second and third 56; of drawn tokens alone
    wanted = [sum(discount ** (u - t) * penalties[u] for u in range(t, 6)) for t in range(6)]
    assert token_advantages(config, ANSWER) == pytest.approx(wanted)
    assert token_advantages(RewardsConfig(), ANSWER) is None


def test_advantages_and_what_counts():
    groups = [[1.0, 0.0, None, 0.0], [0.5, 0.5, 0.5, 0.5]]
    plain = advantages_of(AdvantagesConfig(scale="none"), groups)
    assert plain[0] == pytest.approx([2 / 3, -1 / 3, 0, -1 / 3]) and plain[1] == [0, 0, 0, 0]
    one_out = advantages_of(AdvantagesConfig(scale="none", leave_one_out=True), groups)
    assert one_out[0] == pytest.approx([1, -0.5, 0, -0.5])
    scaled = advantages_of(AdvantagesConfig(), groups)
    assert scaled[0][0] == pytest.approx(2 / 3 / (np.std([1, 0, 0], ddof=1) + 1e-4))
    batch = advantages_of(AdvantagesConfig(scale="batch"), groups)
    assert batch[0][0] == pytest.approx(2 / 3 / (np.std([1, 0, 0, 0.5, 0.5, 0.5, 0.5], ddof=1) + 1e-4))
    assert [varied([{"reward": each} for each in group]) for group in (*groups, [None, 1.0, None, None])] == [True, False, False]
    truncated = {"reward": 0.0, "truncated": True, "ending": "limit"}
    masking = AdvantagesConfig(mask_truncated=True)
    assert counts(AdvantagesConfig(), truncated) and not counts(masking, truncated)
    assert counts(masking, truncated | {"ending": "tail_loop"}) and not counts(masking, truncated | {"reward": None})


def record(slot=0, **answer):
    made = {"temperature": 0.5, "log_probs": [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], "kept": None, "counts": 1, "advantage": 0.25}
    return {"slot": slot, "prompt_ids": [1, 2, 3], "answers": [ANSWER | made | answer]}


def test_rows_have_what_was_drawn_where_it_is_a_target():
    batch = arrays([record(token_advantages=[1.0, 0, 0, 0, 0, 0.5])], 12, None)
    assert batch["tokens"].tolist() == [[1, 2, 3, 5, 6, 5, 6, 9, 9, 5, 0, 0]]
    assert batch["targets"].tolist() == [[2, 3, 5, 6, 5, 6, 9, 9, 5, 6, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1] * 10 + [0, 0]] and batch["positions"][0, :10].tolist() == list(range(10))
    assert batch["advantages"].tolist() == [[0, 0, 1.25, 0.25, 0.25, 0.25, 0, 0, 0.25, 0.75, 0, 0]]
    assert batch["sampler_log_probs"].tolist() == [[0, 0, -1, -2, -3, -4, 0, 0, -5, -6, 0, 0]]
    assert batch["temperature"].tolist() == [0.5] and longest([record()]) == 10 and "kept" not in batch
    assert not arrays([record(counts=False)], 12, None)["loss_mask"].any()
    assert arrays([record(temperature=0.0)], 12, None, greedy_as=0.25)["temperature"].tolist() == [0.25]


def test_bits_and_a_trainers_log_probs_come_back_to_their_places():
    bits = np.random.default_rng(0).integers(0, 1 << 32, (6, 3), np.uint32)
    made = record(kept=encoded_bits(list(bits)))
    assert (decoded_bits(made["answers"][0]["kept"], 6) == bits).all() and encoded_bits([]) is None
    log_probs = np.arange(24, dtype=np.float32).reshape(1, 24) / 7
    with_log_probs([made], "old_log_probs", log_probs)
    batch = arrays([json.loads(json.dumps(made))], 24, 3)
    places = [2, 3, 4, 5, 8, 9]
    assert (batch["old_log_probs"][0, places] == log_probs[0, places]).all() and batch["old_log_probs"][0, 6] == 0
    assert (batch["kept"][0, places] == bits).all() and not batch["kept"][0, 6:8].any()
    assert not arrays([record()], 24, 3)["kept"].any()  # all tokens could be drawn


def test_what_tools_said_and_what_is_left_out_adds_nothing():
    """Whatever stands there: neither loss nor weight nor gradient nor a figure changes."""
    rows = [record(token_ids=[7] * 8), record(), record(counts=False)]
    batch = arrays(rows, 16, None)
    noise, mask = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32), batch["loss_mask"] > 0

    @jax.jit
    def sums(log_probs, sampler, advantages):
        rollouts = Rollouts(advantages, batch["loss_mask"], sampler)
        found = policy_gradient_sums(PolicyGradientConfig(), log_probs, rollouts)
        return found.loss, found

    values = jax.value_and_grad(sums, has_aux=True)
    own = batch["sampler_log_probs"] + 0.1
    first = values(own, batch["sampler_log_probs"], batch["advantages"])
    changed = values(*(np.where(mask, each, noise) for each in (own, batch["sampler_log_probs"], batch["advantages"])))
    jax.tree.map(np.testing.assert_array_equal, first, changed)
    (_, found), gradient = first
    assert found.weight == 12 and not np.asarray(gradient)[~mask].any() and np.asarray(gradient)[mask].all()


def test_files_are_whole_and_those_that_are_needed_stay(tmp_path):
    one, two = (Files(tmp_path, (part, 2)) for part in range(2))
    one.write(1, [record(0), record(1)])
    two.write(1, [record(2), record(3)])
    one.write(2, [record(0)])
    assert one.read(1, range(1, 3), 2) == [record(1), record(2)]
    with pytest.raises(ValueError, match=r"000002.jsonl has not all rollouts .* those of slots \[1\] are missing"):
        one.read(2, range(2), 2)
    one.keep({2})
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["000001-1-of-2.jsonl", "000002-0-of-2.jsonl"]


def test_with_another_number_of_hosts_those_are_read_that_the_checkpoint_is_of(tmp_path):
    """And not what a run of as many as now had left there of the same batch."""
    later = lambda slot: record(slot) | {"seed": 7}
    alone, pair = Files(tmp_path, (0, 1)), [Files(tmp_path, (part, 2)) for part in range(2)]
    alone.write(1, [record(slot) for slot in range(4)])
    for part, files in enumerate(pair):
        files.write(1, [later(2 * part), later(2 * part + 1)])
    assert pair[1].read(1, range(2, 4), 1) == [record(2), record(3)]
    assert pair[1].read(1, range(2, 4), 2) == [record(2), record(3)]  # as it is theirs from now on
    assert alone.read(1, range(4), 2) == [later(0), later(1), record(2), record(3)]


def test_difficulty_follows_the_mean_of_a_window():
    config = CurriculumConfig(window=2, raise_above=0.7, lower_below=0.3, cold_after=3)
    found = Curriculum(config, {"a": 3, "b": 3}, {"a": 2, "b": 2}, {"a": True, "b": False})
    seen = []
    for mean in (1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0):
        found.take({"a": [mean, mean], "b": [mean]})
        seen.append((found.standings["a"].difficulty, found.standings["b"].difficulty))
        found.set_state(json.loads(json.dumps(found.get_state())))
    # 1, .5 raises; .5, 0 lowers; 0, 0 lowers again; 0: a window of one more, at the lowest.
    assert seen == [(2, 2), (3, 2), (3, 2), (2, 2), (2, 2), (1, 2), (1, 2)]


def test_cold_is_who_never_succeeds_for_so_long():
    config = CurriculumConfig(cold_after=3)
    found = Curriculum(config, {"a": 3, "b": 3}, {"a": 1, "b": 1}, {"a": False, "b": False})
    cold = [found.take({"a": [0.0, 0.0], "b": [0.1 * (number == 1)]}) for number in range(6)]
    assert cold == [[], [], ["a"], ["a"], ["a", "b"], ["a", "b"]]  # until something is known of it
    found.standings["a"].cold = {"verdict": "rare"}
    assert found.take({"a": [0.0], "b": []}) == [] and found.standings["b"].failures == 4
    assert found.take({"a": [0.0, 0.2], "b": []}) == [] and found.standings["a"].cold is None


def test_pass_at_k_is_the_share_of_all_choices_of_k():
    for samples, right, k in itertools.product((5,), range(6), (1, 2, 5)):
        chosen = list(itertools.combinations([1] * right + [0] * (samples - right), k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    found = probe_figures([{"samples": 64, "right": 0}, {"samples": 64, "right": 1}])
    shares = {"pass_at_1": 1 / 128, "pass_at_4": 1 / 32, "pass_at_16": 1 / 8, "pass_at_64": 0.5}
    assert found == {"verdict": "rare", "samples": 64, **shares}
    assert probe_figures([{"samples": 2, "right": 0}])["verdict"] == "absent"


def test_the_best_checkpoints_are_those_of_the_highest_accuracy():
    train = from_mapping(TrainConfig, {**get_config().train, "keep_best": 1})
    answer = {"correct": 1, "ending": "limit", "tokens": 3}
    assert train.score(held_out_figures([answer, answer | {"correct": 0}])) == -0.5


def test_figures_are_of_environments_and_temperatures_too():
    answer = lambda temperature, correct, tokens: {
        "temperature": temperature, "tokens": tokens, "turns": 1, "truncated": tokens > 9, "repetition": 0.0, "counts": True,
        "ending": "tail_loop" if tokens > 9 else "ended", "parts": {"correct": correct, "format": 1.0}, "reward": correct,
        "rewards": {"correct": correct},
    }  # fmt: skip
    about = {"difficulty": 1, "rounds": 1, "left_out": 0}
    found = batch_figures(
        [
            {"environment": "a", **about, "answers": [answer(1.0, 1.0, 2), answer(0.0, 0.0, 10)]},
            {"environment": "b", **about, "rounds": 3, "answers": [answer(1.0, 0.0, 4), answer(0.0, 0.0, 6)]},
            {"environment": "b", **about, "answers": [answer(1.0, None, 4), answer(0.0, 0.0, 6)]},
        ],
        [1.0, 0.0],
    )
    assert found["reward"] == 1 / 5 and found["right"] == 1 / 5 and found["unscored"] == 1 / 6 and found["part_format"] == 1
    assert (found["right_answer_tokens"], found["wrong_answer_tokens"], found["wrong_answer_tokens_of_b"]) == (2, 6.5, 16 / 3)
    assert found["groups_without_variance"] == 2 / 3 and found["groups_without_variance_of_a"] == 0
    assert found["groups_replaced"] == 2 and "right_answer_tokens_of_b" not in found
    assert (found["tail_loop_at_0"], found["tail_loop_at_1"], found["reward_at_1"]) == (1 / 3, 0, 0.5)


def test_environments_by_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?", "number": n}) + "\n" for n in range(40)))
    source = source_named(f"trl:{__name__}:Guess:{tmp_path / 'rows.jsonl'}", 2)
    game, other = source.make(), source.make()
    problem = game.reset(0, 1)
    other.reset(1, 1)
    number = problem.reference["number"]
    assert problem.messages[-1]["content"] == f"{number}? Guess it." and problem.tools[0]["function"]["name"] == "guess"
    game.step(f"<|tool_call_start|>[guess(number={number})]<|tool_call_end|>")
    assert game.score()["correct"] == 1 and other.score()["correct"] == 0
    assert source_named("shop", 2).make().max_turns == 2 and source_named("shop", 2).task is None
    single = source_named("arithmetic", 1).make()
    problem = single.reset(3, 1)
    assert isinstance(single, SingleTurn) and single.step(problem.solution).done and single.score()["correct"] == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("arithmetics", "no task is named 'arithmetics'; did you mean 'arithmetic'"),
        ("trl:a:b", "must be trl:MODULE:CLASS:ROWS"),
        ("trl:no_such_module:B:rows", "the class cannot be imported"),
        ("trl:json:loads_of:rows", "the class cannot be imported"),
        (f"trl:{__name__}:Guess:no_such_file", "no_such_file: rows are lines of JSON, and these cannot be read"),
    ],
)
def test_environments_that_are_none_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        source_named(name, 2)


def test_rows_that_are_none_are_refused(tmp_path):
    for text, message in (("[1]\n", "expected a mapping in each line"), ("[" * 100_000, "rows are lines of JSON, and these")):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            source_named(f"trl:{__name__}:Guess:{tmp_path / 'rows.jsonl'}", 2)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (EnvironmentsConfig, {"names": ()}, "names must be of one environment or more, each once, got none"),
        (EnvironmentsConfig, {"names": ("a", "a")}, "each once, got a, a"),
        (EnvironmentsConfig, {"names": ("a",), "weights": (1.0, 2.0)}, "weights has 2 values for 1 names"),
        (EnvironmentsConfig, {"names": ("a",), "weights": (0.0,)}, "weights must be positive"),
        (EnvironmentsConfig, {"names": ("a",), "max_turns": 0}, "max_turns must be at least 1, got 0"),
        (CurriculumConfig, {"window": 0}, "window must be at least 1, got 0"),
        (CurriculumConfig, {"lower_below": 0.9}, "below raise_above, which is at most 1, got 0.9 and 0.8"),
        (RolloutsConfig, {"prompts": 0}, "prompts must be at least 1, got 0"),
        (RolloutsConfig, {"temperatures": ((1.0, 1),)}, "temperatures must give each prompt 2 answers or more"),
        (RolloutsConfig, {"temperatures": ((1.0, 1), (0.0, 2))}, "temperatures must have one answer at 0"),
        (RolloutsConfig, {"max_new_tokens": 512}, "seq_len must be above max_new_tokens 512, or no prompt has room, got 512"),
        (RolloutsConfig, {"prompts": 4, "mini_batches": 3}, "prompts 4 do not divide into 3 mini_batches of whole groups"),
        (RolloutsConfig, {"keep": -1}, "extra_rounds and keep must not be negative, got 0 and -1"),
        (RolloutsConfig, {"top_p": 0.0}, "top_p must be in"),
        (RewardsConfig, {"loop_penalty": 0.1}, "loop_penalty must be 0 or less, got 0.1"),
        (RewardsConfig, {"ngram_discount": 1.5}, "ngram_discount from 0 to 1, got 10, 1.5"),
        (EvaluationConfig, {"problems": 0}, "problems must be at least 1, got 0"),
        (Config, {"block": 0}, "block must be at least 1 token, got 0"),
        (Config, {"engine": EngineConfig(context=64)}, "engine.context is rollouts.seq_len here, 512"),
        (Config, {"engine": EngineConfig(tell_routing=True)}, "engine.tell_routing is set by the model here"),
        (Config, {"rollouts": RolloutsConfig(lag=1)}, "set policy.importance_cap, about 2"),
        (Config, {"rewards": RewardsConfig(overlong_buffer=256)}, "buffer must be at least 1 token and less than max_tokens 256"),
    ],
)  # fmt: skip
def test_mistakes_are_told(kind, changes, message):
    if kind is Config:
        needed = {"init_from": "a", "environments": EnvironmentsConfig(names=("arithmetic",)), "train": TrainConfig(steps=8)}
        changes = needed | changes
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_an_answers_draws_are_by_its_numbers_alone():
    assert answer_seed(0, 1, 0, 5, 2, 0) == answer_seed(0, 1, 0, 5, 2, 0) != answer_seed(0, 1, 0, 2, 5, 0)
    assert 0 <= answer_seed(0, "probe", "a", 1) < 1 << 32 and math.isfinite(answer_seed(1))
