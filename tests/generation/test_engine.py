"""The engine: whatever else it answers, an answer is that of full forward passes over its own tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from engine_answers import (
    ALL,
    CONFIG,
    GREEDY,
    LENGTHS,
    MOE,
    NEW,
    SMALL,
    by_full_forwards,
    check,
    engine,
    forward,
    prompts,
    requests,
    weights,
    words_of,
)

from lfm_jax.generation import Engine, EngineConfig, LoopConfig, Request, SamplingConfig
from lfm_jax.generation import slots as device
from lfm_jax.generation.engine import _tell
from lfm_jax.sharding import MeshConfig, make_mesh, parameter_sharding


@pytest.mark.parametrize("settings", [ALL, SMALL, EngineConfig(slots=1, prefill_chunk=4, steps=3)])
def test_answers_do_not_depend_on_who_else_is_answered(settings):
    """All at once; two at a time in slots that are used again, prompts in chunks shorter than the window; one by one."""
    check(engine(settings).run(requests()), requests())


def test_answers_of_a_mixture_of_experts():
    answers = engine(SMALL, MOE).run(requests())
    check(answers, requests(), MOE)
    assert all(answer.routing is None for answer in answers)  # unless it is asked for


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_may_be_padded_on_either_side(side):
    functions, config, params, buffers = weights()
    program = device.Program(functions, config, jnp.dtype(jnp.float32), 32)
    rows = device.empty_rows(program, len(LENGTHS), 64)
    tokens, segment_ids = np.zeros((2, len(LENGTHS), 32), np.int32)
    for row, prompt in enumerate(prompts()):
        place = slice(32 - len(prompt), None) if side == "left" else slice(len(prompt))
        tokens[row, place], segment_ids[row, place] = prompt, 1
    rows, _ = device.prefill(program, params, buffers, rows, tokens, segment_ids)
    logits = jax.jit(lambda hidden: functions.bind(params, buffers).logits(hidden))(rows.hidden[:, None])
    for row, prompt in enumerate(prompts()):
        np.testing.assert_allclose(jax.nn.log_softmax(logits[row, 0]).max(), by_full_forwards(prompt)[1][0], atol=2e-5)


def test_requests_of_all_kinds_do_not_disturb_each_other():
    kinds = [
        (GREEDY, (), 2), (SamplingConfig(max_new_tokens=20, top_k=4, min_p=0.05, seed=6), (4, 5), 0),
        (SamplingConfig(max_new_tokens=15, repetition_penalty=0.8, top_p=0.5), (6,), 0),
    ]  # fmt: skip
    asked = [
        Request(prompt=prompt, sampling=kind, stop_ids=stops, top_log_probs=top)
        for prompt, (kind, stops, top) in zip(prompts()[2:5], kinds, strict=True)
    ]
    together, used = engine(SMALL), engine(EngineConfig(slots=4, steps=5))
    for answer, alone in zip(together.run(asked), [used.run([request])[0] for request in asked], strict=True):
        assert answer.tokens == alone.tokens and answer.finish_reason == alone.finish_reason
        np.testing.assert_allclose(answer.log_probs, alone.log_probs, atol=2e-5)


def test_samples_of_one_prompt_read_it_once_and_differ_by_their_seeds():
    prompt, running = prompts()[3], engine(EngineConfig(slots=4))
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=1.0, top_p=1.0)
    answers = running.run([Request(prompt=prompt, sampling=dataclasses.replace(sampling, seed=seed)) for seed in range(10)])
    assert running.prompt_tokens_read == len(prompt)
    assert len({tuple(answer.tokens) for answer in answers}) == 10
    (again,) = running.run([Request(prompt=prompt, sampling=dataclasses.replace(sampling, seed=7))])
    assert again.tokens == answers[7].tokens


def test_log_probs_are_the_models_whatever_the_sampling():
    prompt = prompts()[2]
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.7, top_k=9, repetition_penalty=1.4)
    (answer,) = engine().run([Request(prompt=prompt, sampling=sampling, top_log_probs=4)])
    for index, (token, log_prob, top) in enumerate(zip(answer.tokens, answer.log_probs, answer.top, strict=True)):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(prompt) + index] = (*prompt, *answer.tokens[:index])
        expected = np.asarray(forward()(padded, len(prompt) + index))
        assert log_prob == pytest.approx(expected[token], abs=2e-5)
        assert [index for index, _ in top] == list(np.argsort(-expected)[:4])
        np.testing.assert_allclose([value for _, value in top], np.sort(expected)[::-1][:4], atol=2e-5)


def _drawn_from(log_probs, sampling):
    """The log-probabilities that a token is drawn by, in float64 and by sorting."""
    logits = log_probs.astype(np.float64) / (sampling.temperature or 1)
    order, probs = np.argsort(-logits), scipy.special.softmax(logits)
    kept = np.ones(len(logits), bool)
    if sampling.truncates:
        kept[order[sampling.top_k or len(order) :]] = False
        probs = np.where(kept, probs, 0) / probs[kept].sum()
        kept[order[1 + np.searchsorted(np.cumsum(probs[order]), sampling.top_p) :]] = False
        kept &= probs >= sampling.min_p * probs.max()
    return np.where(kept, logits, -np.inf) - scipy.special.logsumexp(logits[kept])


def test_what_was_drawn_from_is_told_beside_the_models_own_log_probs():
    """Among requests that do not ask; the tokens are those that come without being asked."""
    known = dataclasses.replace(CONFIG, tokenizer_vocab_size=33)
    kinds = [
        {"temperature": 0.6}, {"top_k": 4}, {"temperature": 1.3, "top_p": 0.7}, {"top_k": 20, "min_p": 0.1}, {"temperature": 0},
    ]  # fmt: skip
    plain = SamplingConfig(max_new_tokens=6, temperature=1.0, top_p=1.0)
    asked = [Request(prompt=prompts()[2], sampling=dataclasses.replace(plain, **kind)) for kind in kinds]
    running = Engine(weights()[0], known, *weights()[2:])
    both = [*asked, *(dataclasses.replace(request, drawn=True) for request in asked)]
    answers = running.run(both)
    for request, told, silent in zip(asked, answers[len(asked) :], answers, strict=False):
        assert told.tokens == silent.tokens and silent.drawn_log_probs == [] and silent.kept is None
        np.testing.assert_allclose(told.log_probs, silent.log_probs, atol=2e-5)
        assert (told.kept is not None) == request.sampling.truncates
        for index, (token, drawn) in enumerate(zip(told.tokens, told.drawn_log_probs, strict=True)):
            padded = np.zeros((1, 128), np.int32)
            padded[0, : len(request.prompt) + index] = (*request.prompt, *told.tokens[:index])
            expected = _drawn_from(np.asarray(forward()(padded, len(request.prompt) + index))[:33], request.sampling)
            assert drawn == pytest.approx(expected[token], abs=5e-5)
            if told.kept is not None:
                words = sum(int(word) << 32 * number for number, word in enumerate(told.kept[index]))
                assert [id for id in range(64) if words >> id & 1] == list(np.flatnonzero(np.isfinite(expected)))


def test_programs_of_requests_that_do_not_ask_are_the_same_as_ever():
    """What is told beside the tokens is a static argument: nobody else pays."""
    cut = SamplingConfig(top_k=3)
    request = lambda sampling, drawn: Request(prompt=(1,), sampling=sampling, drawn=drawn)
    assert _tell([request(cut, False), request(GREEDY, False)]) == device.NOTHING_ELSE
    uncut = request(dataclasses.replace(GREEDY, top_k=3), True)
    assert _tell([request(cut, False), uncut]) == device.Tell(drawn=True, kept=False)
    assert _tell([request(cut, True), request(GREEDY, False)]) == device.Tell(drawn=True, kept=True)


@functools.cache
def other_params():
    wave = lambda leaf: 0.1 * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
    return jax.tree.map(lambda leaf: leaf + wave(leaf), weights()[2])


@pytest.mark.parametrize("settings", [EngineConfig(prefix_bytes=1 << 20), EngineConfig(weights="int8")])
def test_new_weights_answer_as_a_new_engine_would_and_compile_nothing(settings):
    functions, config, params, buffers = weights()
    first, turn = (Request(prompt=(*prompts()[3], *more), sampling=GREEDY) for more in ((), (9, 9)))
    running = Engine(functions, config, params, buffers, settings)
    (before,) = running.run([first])
    programs = [running._prepare, device.prefill, device.insert, device.decode, device.empty_slots, device.take_row]
    compiled, read = [program._cache_size() for program in programs], running.prompt_tokens_read
    running.load(other_params(), buffers)
    (after,) = running.run([turn])
    assert running.prompt_tokens_read - read == len(turn.prompt)  # what had been read is forgotten
    running.load(params, buffers)
    assert running.run([first]) == [before]
    assert [program._cache_size() for program in programs] == compiled
    assert [after] == Engine(functions, config, other_params(), buffers, settings).run([turn])
    assert after.tokens != before.tokens


def test_weights_are_the_engines_own_when_a_training_step_takes_the_callers():
    """The biases of experts as well, which nothing casts."""
    functions, config, params, buffers = weights(MOE)
    running = Engine(functions, config, *weights(MOE)[2:])
    taken = jax.tree.map(jnp.array, (params, buffers))
    running.load(*taken)
    for leaf in jax.tree.leaves(taken):
        leaf.delete()
    check(running.run(requests()[:1]), requests()[:1], MOE)


def test_weights_are_not_changed_amid_answers():
    """Nor are prompts that some waited with read by the old ones."""
    running, asked = engine(EngineConfig(slots=1, steps=2)), requests()[0]
    numbers = [running.submit(asked) for _ in range(2)]
    running.step()
    with pytest.raises(ValueError, match="1 requests are being answered and 1 wait; an answer is by one model"):
        running.load(*weights()[2:])
    for number in numbers:
        running.cancel(number)
    read = running.prompt_tokens_read
    running.load(*weights()[2:])
    check(running.run([asked]), [asked])
    assert running.prompt_tokens_read - read == len(asked.prompt)


def test_of_a_small_vocabulary_all_tokens_may_be_told():
    small = dataclasses.replace(CONFIG, vocab_size=12)
    (answer,) = engine(config=small).run([Request(prompt=(1, 2), sampling=GREEDY, top_log_probs=12)])
    assert all(sorted(index for index, _ in top) == list(range(12)) for top in answer.top)
    np.testing.assert_allclose([sum(np.exp([value for _, value in top])) for top in answer.top], 1, atol=1e-5)


def test_padded_vocab_is_never_told():
    running = Engine(weights()[0], dataclasses.replace(CONFIG, tokenizer_vocab_size=11), *weights()[2:])
    (answer,) = running.run([Request(prompt=(1, 2), sampling=GREEDY, top_log_probs=11)])
    assert all(sorted(index for index, _ in top) == list(range(11)) for top in answer.top)
    assert answer.tokens == [top[0][0] for top in answer.top]
    with pytest.raises(ValueError, match=r"top_log_probs must be in 0..11, got 12"):
        running.submit(Request(prompt=(1, 2), sampling=GREEDY, top_log_probs=12))


def test_padded_vocab_is_never_answered():
    padded = dataclasses.replace(CONFIG, tokenizer_vocab_size=11)
    sampling = SamplingConfig(max_new_tokens=60, temperature=5.0, top_p=1.0)
    (answer,) = Engine(weights()[0], padded, *weights()[2:]).run([Request(prompt=(1,), sampling=sampling)])
    assert max(answer.tokens) == 10


@pytest.mark.parametrize("settings", [ALL, SMALL])
def test_an_answer_ends_with_the_stop_token(settings):
    stop = by_full_forwards(prompts()[0])[0][3]
    for answer, request in zip(engine(settings).run(requests(stop_ids=(99, stop))), requests(), strict=True):
        tokens, _ = by_full_forwards(request.prompt)
        assert answer.tokens == (tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)
        assert answer.finish_reason == ("stop" if stop in tokens else "length")


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_an_answer_ends_before_the_stop_string_and_its_slot_is_free(steps):
    """Of what is computed behind it nothing is told, however much it is."""
    tokens, _ = by_full_forwards(prompts()[0])
    stop = f"{tokens[4]}><{tokens[5]}"
    running = engine(EngineConfig(slots=1, steps=steps), decode=words_of)
    first, second = running.run([dataclasses.replace(requests()[0], stop_strings=("zzz", stop)), requests()[1]])
    assert first.text == words_of(tokens[:12]).split(stop)[0] and first.finish_reason == "stop"
    complete = next(count for count in range(13) if stop in words_of(tokens[:count]))
    assert first.tokens == tokens[:complete] and len(first.log_probs) == len(first.top) == complete < 12
    assert second.tokens == by_full_forwards(prompts()[1])[0] and second.text == words_of(second.tokens)


def test_an_answer_that_loops_ends_there():
    endless = dataclasses.replace(GREEDY, max_new_tokens=100, repetition_penalty=0.01)  # what was said is said again
    loop = LoopConfig(period=8, repeats=3, tokens=12)
    free, ended = engine().run([Request(prompt=(1, 2), sampling=endless), Request(prompt=(1, 2), sampling=endless, loop=loop)])
    assert free.finish_reason == "length" and ended.finish_reason == "loop"
    assert ended.tokens == free.tokens[: len(ended.tokens)] and 12 <= len(ended.tokens) < 60


@pytest.mark.parametrize("settings", [{}, {"slots": 2, "prefill_chunk": 8, "steps": 5}])
def test_a_second_turn_reads_only_what_is_new_and_equals_the_cold_run(settings):
    running = engine(EngineConfig(prefix_bytes=1 << 20, **settings))
    answers = running.run(requests())
    said = [(*request.prompt, *answer.tokens, 5, 6) for request, answer in zip(requests(), answers, strict=True)]
    turns = [Request(prompt=prompt, sampling=GREEDY) for prompt in said]
    before = running.prompt_tokens_read
    check(running.run(turns), turns)
    assert running.prompt_tokens_read - before == 3 * len(turns)  # the last token of each answer had not been read


def test_a_turn_whose_answer_was_changed_goes_on_from_the_prompt():
    running, prompt = engine(EngineConfig(prefix_bytes=1 << 20)), prompts()[3]
    running.run([Request(prompt=prompt, sampling=GREEDY)])
    before, turn = running.prompt_tokens_read, Request(prompt=(*prompt, 9, 9, 9, 9), sampling=GREEDY)
    check(running.run([turn]), [turn])
    assert running.prompt_tokens_read - before == 4


def test_what_was_generated_behind_a_stop_string_is_no_part_of_what_is_kept():
    prompt, (tokens, _) = prompts()[0], by_full_forwards(prompts()[0])
    running = engine(EngineConfig(prefix_bytes=1 << 20, steps=16), decode=words_of)
    running.run([Request(prompt=prompt, sampling=GREEDY, stop_strings=(f"<{tokens[4]}>",))])
    for continued in ((*prompt, *tokens[:4], 7, 7), (*prompt, *tokens, 7, 7)):
        turn = Request(prompt=continued, sampling=GREEDY)
        check(running.run([turn]), [turn])


def test_four_devices_answer_as_one():
    functions, config, params, buffers = weights()
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), devices=jax.devices()[:4])
    place = lambda leaf, axes: jax.device_put(leaf, parameter_sharding(mesh, axes, leaf.shape))
    sharded = jax.tree.map(place, params, functions.param_axes)
    running = Engine(functions, config, sharded, buffers, EngineConfig(slots=4, prefill_chunk=32), mesh=mesh)
    check(running.run(requests()), requests())


def test_parameters_are_kept_in_the_type_they_are_computed_in():
    functions, config, params, buffers = weights(dtype="bfloat16")
    running = Engine(functions, config, params, buffers)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(running._model[0])}
    assert kinds == {"bfloat16", "float32"} and running._model[0]["layers"][1]["mlp"]["up"].dtype == jnp.bfloat16
    exact = by_full_forwards(prompts()[3])[1]
    (answer,) = running.run([Request(prompt=prompts()[3], sampling=GREEDY)])
    assert answer.log_probs[0] == pytest.approx(exact[0], abs=0.1)  # 8 bits of mantissa through four layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "needs at least one token"),
        ({"prompt": (40,)}, r"must be in 0..39, got 40..40"),
        ({"prompt": (-1, 2)}, r"must be in 0..39, got -1..2"),
        ({"prompt": (1,) * 117}, "a prompt of 117 tokens and an answer of up to 12 do not fit into a context of 128"),
        ({"stop_strings": ("x",)}, "stop strings need an engine with a tokenizer"),
        ({"top_log_probs": 21}, r"top_log_probs must be in 0..20, got 21"),
        ({"drawn": True, "sampling": SamplingConfig(max_new_tokens=2, repetition_penalty=1.1)}, "no repetition_penalty, got 1.1"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(changes, message):
    running = engine()
    with pytest.raises(ValueError, match=message):
        running.run([requests()[0], dataclasses.replace(requests()[0], **changes)])
    assert running.waiting == 0


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        engine(decode=words_of).submit(requests(stop_strings=("",))[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots must be positive, got 0"), ({"steps": 0}, "steps must be positive"),
        ({"context": 1}, "context must have room for a prompt and an answer, got 1"),
        ({"prefix_bytes": -1}, "prefix_bytes must not be negative, got -1"),
    ],
)  # fmt: skip
def test_bad_engine_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)
