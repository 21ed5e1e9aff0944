"""Slots of the engine: who gets them and when, and what is in them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_answers import CONFIG, GREEDY, SMALL, by_full_forwards, check, engine, greedy, prompts, requests, weights, words_of

from lfm_jax.generation import EngineConfig, Request
from lfm_jax.generation import slots as device
from lfm_jax.generation.requests import joined
from lfm_jax.generation.sampling import needs_of


def test_requests_that_come_later_take_slots_that_become_free():
    """Among them longer ones, for which the slots grow while others are being answered."""
    running, first, later = engine(EngineConfig(slots=3, steps=2)), requests()[:2], requests()[2:]
    later = [dataclasses.replace(each, sampling=dataclasses.replace(GREEDY, max_new_tokens=34)) for each in later]
    parts = {running.submit(request): [] for request in first}
    for step in range(60):
        if step == 2:
            parts |= {running.submit(request): [] for request in later}
        for update in running.step():
            parts[update.request].append(update)
    assert running.active == running.waiting == 0
    for request, updates in zip([*first, *later], parts.values(), strict=True):
        assert [token for update in updates for token in update.tokens] == by_full_forwards(
            request.prompt, request.sampling.max_new_tokens
        )[0]
        assert [update.finish_reason for update in updates] == [None] * (len(updates) - 1) + ["length"]


def test_a_request_that_waits_begins_when_the_first_of_the_others_ends():
    """Not when all of them have ended, and not only after the `steps` of a call."""
    running = engine(EngineConfig(slots=2, steps=16))
    asked = [greedy(prompt, count) for prompt, count in zip(prompts(), (40, 4, 6), strict=False)]
    long, short, third = numbers = [running.submit(request) for request in asked]
    steps = [running.step() for _ in range(4)]
    assert [[(update.request, len(update.tokens), update.finish_reason) for update in step] for step in steps] == [
        [(long, 1, None), (short, 1, None), (long, 3, None), (short, 3, "length")],
        [(third, 1, None), (long, 16, None), (third, 5, "length")],
        [(long, 16, None)],
        [(long, 4, "length")],
    ]
    parts = [[update for step in steps for update in step if update.request == number] for number in numbers]
    check(map(joined, parts), asked, atol=1e-4)


def test_a_cpu_advances_one_row_without_copying_what_it_remembers():
    """XLA would copy the whole cache four times a token, which took most of a step at 3,500 tokens (docs/log.md, 2026-11-28)."""
    functions, config, params, buffers = weights()
    program = device.Program(functions, config, jnp.float32, 8)
    slots = device.empty_slots(program, 1, 64, 1, False)
    lowered = device.decode.lower(
        program, params, buffers, slots, np.ones(1, bool), np.bool_(False), steps=4, reach=32, needs=needs_of([GREEDY]), top=0
    )  # fmt: skip
    full, sliding = ({state.keys.shape[3], 32} for state in (slots.cache.layers[1], slots.cache.layers[2]))
    places = "|".join(map(str, full | sliding))
    cache = rf"f32\[1,2,(?:8,(?:{places})|(?:{places}),8)\]"
    text = lowered.compile().as_text()
    assert re.search(cache, text)
    assert not re.findall(rf"= {cache}\S* copy\(", text)


def test_a_repetition_penalty_counts_the_own_prompt_and_answer_and_nothing_else():
    """It comes beside an answer without one, is joined by another, and then by one with it that needs larger slots and takes the
    first one's."""
    running = engine(EngineConfig(slots=4, steps=2))
    first, second, third, fourth, *_ = prompts()
    asked = [greedy(third, 6), greedy(fourth, 30, penalty=1.3), greedy(first, 8), greedy(second, 80, penalty=1.3)]
    parts, sizes = {}, []
    for request in asked:
        parts[running.submit(request)] = []
        for update in running.step():
            parts[update.request].append(update)
        sizes.append((len(running._answers), running._capacity))
    assert sizes == [(1, 64), (2, 64), (4, 64), (4, 128)] and running._answers[0].request is asked[3]
    while running.active:
        for update in running.step():
            parts[update.request].append(update)
    answers = [joined(updates) for updates in parts.values()]
    check(answers, asked, atol=1e-4)
    free = [by_full_forwards(request.prompt, request.sampling.max_new_tokens)[0] for request in asked]
    assert [answer.tokens == tokens for answer, tokens in zip(answers, free, strict=True)] == [True, False, True, False]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("how", ["cancel", "stop string"])
def test_a_slot_that_is_left_early_disturbs_neither_its_neighbour_nor_its_successor(how, waits):
    """Whether somebody waits for it or comes later."""
    running = engine(EngineConfig(slots=2, steps=6), decode=words_of)
    neighbour, leaving, successor = greedy(prompts()[3], 50), greedy(prompts()[0], 40), greedy(prompts()[2], 12)
    if how == "stop string":
        tokens, _ = by_full_forwards(leaving.prompt)
        leaving = dataclasses.replace(leaving, stop_strings=(words_of(tokens[4:6]),))
    numbers = [running.submit(request) for request in (neighbour, leaving)]
    if waits:
        numbers.append(running.submit(successor))
    updates = running.step()
    if how == "cancel":
        for _ in range(2):
            running.cancel(numbers[1])
    if not waits:
        updates += running.step()
        assert np.asarray(running._slots.left)[1] == 0 and running.active == 1  # it does not go on for nobody
        numbers.append(running.submit(successor))
    updates += running.step()
    assert running._answers[1].number == numbers[2]
    while running.active:
        updates += running.step()
    found = [joined([update for update in updates if update.request == number]) for number in numbers]
    check([found[0], found[2]], [neighbour, successor], atol=1e-4)
    reasons = [update.finish_reason for update in updates if update.request == numbers[1] and update.finish_reason]
    assert reasons == ["cancelled" if how == "cancel" else "stop"]


def test_what_is_set_aside_for_a_long_answer_is_not_read_before_it_is_there(monkeypatch):
    reached, decode = [], device.decode
    monkeypatch.setattr(device, "decode", lambda *given, **named: reached.append(named["reach"]) or decode(*given, **named))
    sampling = dataclasses.replace(GREEDY, max_new_tokens=70)
    (found,) = engine().run([Request(prompt=prompts()[3], sampling=sampling)])
    assert reached == [64, 64, 128, 128, 128]
    tokens, log_probs = by_full_forwards(prompts()[3], 70)
    assert found.tokens == tokens
    np.testing.assert_allclose(found.log_probs, log_probs, atol=1e-4)


def test_rows_and_slots_are_written_where_they_are(monkeypatch):
    """A cache is in memory once: what a call is given and gives back changed is donated."""
    given = {"prefill": [], "insert": [], "decode": []}
    for name, states in given.items():
        call = getattr(device, name)
        recorded = lambda *args, call=call, states=states, **named: states.append(args[3]) or call(*args, **named)
        monkeypatch.setattr(device, name, recorded)
    engine(SMALL).run(requests()[2:4])
    for name, states in given.items():
        assert len(states) > 1 and all(leaf.is_deleted() for leaf in jax.tree.leaves(states)), name


def test_a_sliding_window_keeps_what_a_call_still_sees_and_no_more():
    running = engine(SMALL)
    running.run([greedy(prompts()[3], 90)])
    _, full, sliding, _ = running._slots.cache.layers
    assert (full.keys.shape, full.values.shape) == ((1, 2, 8, 128), (1, 2, 128, 8))
    places = CONFIG.sliding_window + SMALL.prefill_chunk - 1
    assert (sliding.keys.shape, sliding.values.shape) == ((1, 2, 8, places), (1, 2, places, 8))


def test_a_cancelled_request_leaves_its_slot_or_the_queue():
    running = engine(EngineConfig(slots=1, steps=2))
    numbers = [running.submit(request) for request in requests()[:3]]
    running.step()
    running.cancel(numbers[0])
    running.cancel(numbers[1])
    running.cancel(999)
    ends = {}
    for _ in range(20):
        ends |= {update.request: update.finish_reason for update in running.step() if update.finish_reason}
    assert ends == dict(zip(numbers, ("cancelled", "cancelled", "length"), strict=True))
    assert running.active == running.waiting == 0 and running.step() == []
