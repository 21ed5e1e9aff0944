"""Chat formats in our own code: the texts of the published templates, and what of them an assistant has said."""

import hypothesis
import hypothesis.strategies as st
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from data_pipelines.conversations import CHAT_FORMATS, Conversation, JinjaTemplate, render_prompts, render_turns
from lfm_jax.interop.chat_template import render

PUBLISHED = {"lfm2": "LFM2-8B-A1B", "lfm2_5": "LFM2.5-8B-A1B", "lfm2_5_instruct": "LFM2.5-Instruct"}
BOS = "<|startoftext|>"
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "x": "<&> caf\u00e9"}}}

texts = st.one_of(
    st.sampled_from(
        ["", "Hi\n", "\n\n two ", "caf\u00e9 \u4f60\u597d \U0001f976", "<think>a</think> b\n", "</think>", "it's \"x\"\\", "[1]"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)
calls = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["f", "get_weather"]),
    st.dictionaries(st.sampled_from(["a", "where", "from"]), values, max_size=3),
)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts},
    optional={"thinking": texts, "tool_calls": st.lists(calls, min_size=1, max_size=2)},
)
plain_answers = st.fixed_dictionaries({"role": st.just("assistant"), "content": texts})
others = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": texts})
system = st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": texts}), max_size=1)
tools = st.lists(st.just(TOOL), max_size=2)


def conversations(answer):
    """Any system message, then a question and messages of all kinds, an answer among them."""
    question = st.fixed_dictionaries({"role": st.just("user"), "content": texts})
    turns = st.lists(st.one_of(answer, others), max_size=5)
    return st.builds(lambda s, q, before, a, after: [*s, q, *before, a, *after], system, question, turns, answer, turns)


@pytest.fixture(scope="module")
def published(published_data):
    folder = published_data / "lfm_templates"
    return {name: (folder / f"{file}.jinja").read_text() for name, file in PUBLISHED.items()}


def _theirs(template, messages, tools, prompt=False, **settings):
    given_tools = tools or None
    return render_jinja_template(
        [messages], tools=given_tools, chat_template=template, add_generation_prompt=prompt, bos_token=BOS, **settings
    )


@pytest.mark.parametrize("name", PUBLISHED)
@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(st.data(), tools, st.booleans())
def test_texts_are_those_of_the_published_templates(name, published, data, tools, prompt):
    """Of answers with thinking and calls where the template has a place for them."""
    messages = data.draw(conversations(answers if name == "lfm2_5" else plain_answers))
    expected = _theirs(published[name], messages, tools, prompt)[0][0]
    assert CHAT_FORMATS[name].render(messages, tools, prompt) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_texts_are_those_of_the_renderer_for_templates_from_outside(name, published):
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "<think>cold</think>20 degrees"}, {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    expected = render(
        published[name], messages, tools=[TOOL, TOOL], add_generation_prompt=True, special_tokens={"bos_token": BOS}
    )
    assert CHAT_FORMATS[name].render(messages, [TOOL, TOOL], True) == expected


@pytest.mark.parametrize("name", PUBLISHED)
@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(conversations(answers), tools, st.booleans())
def test_a_format_in_jinjas_language_makes_the_same_texts(name, messages, tools, prompt):
    chat_format = CHAT_FORMATS[name]
    assert _theirs(chat_format.jinja(), messages, tools, prompt)[0][0] == chat_format.render(messages, tools, prompt)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_message_lacks_is_left_out_in_jinjas_language_too(name):
    arguments = {"where": 'S"F', "days": [1, None, True], "x": {"a": None}, "n": -74.0}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call, call]}, {"role": "tool", "content": {"a": [None]}}]
    messages += [{"role": "assistant", "content": None, "thinking": None, "tool_calls": None}]
    found = render(CHAT_FORMATS[name].jinja(), messages, tools=["plain", TOOL], special_tokens={"bos_token": BOS})
    assert found == CHAT_FORMATS[name].render(messages, ["plain", TOOL])


def test_what_tools_answer_may_be_any_json(published):
    messages = [{"role": "user", "content": "?"}, {"role": "tool", "content": {"degrees": [20, None, "caf\u00e9"]}}]
    for name in ("lfm2", "lfm2_5_instruct"):
        assert CHAT_FORMATS[name].render(messages) == _theirs(published[name], messages, None)[0][0]
    answer = '<|tool_response_start|>{"degrees": [20, null, "caf\u00e9"]}<|tool_response_end|>'
    assert answer in CHAT_FORMATS["lfm2"].render(messages)


@pytest.mark.parametrize("name", ["lfm2", "lfm2_5_instruct"])
def test_calls_and_thinking_are_what_the_content_would_have_spelled(name, published):
    arguments = {"where": 'S"F', "days": [1, None, True], "x": {"a": None}, "n": -74.0}
    answer = {"role": "assistant", "content": "Let me see.", "thinking": "look it up"}
    answer["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": arguments}}] * 2
    call = 'f(where="S\\"F", days=[1, None, True], x={"a": null}, n=-74.0)'
    said = f"<think>look it up</think>Let me see.<|tool_call_start|>[{call}, {call}]<|tool_call_end|>"
    question = {"role": "user", "content": "?"}
    expected = _theirs(published[name], [question, {"role": "assistant", "content": said}], None)[0][0]
    assert CHAT_FORMATS[name].render([question, answer]) == expected


def test_the_first_turn_may_be_anyones():
    chat_format = CHAT_FORMATS["lfm2"]
    assert chat_format.render([], (), True) == "<|startoftext|><|im_start|>assistant\n"
    assert chat_format.render([{"role": "assistant", "content": None}]) == "<|startoftext|><|im_start|>assistant\n<|im_end|>\n"
    assert chat_format.render([], ["plain"]) == (
        "<|startoftext|><|im_start|>system\nList of tools: <|tool_list_start|>[plain]<|tool_list_end|><|im_end|>\n"
    )


@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(conversations(answers))
def test_answers_are_what_the_published_template_marks_as_generated(published, messages):
    """LFM2.5-8B-A1B's template marks what an assistant says, and transformers tells where in the text that is."""
    at = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    (found,) = render_turns([Conversation(messages)], CHAT_FORMATS["lfm2_5"])
    said = [turns.text[first:end] for turns in found for first, end in turns.spans]
    seen = [turns.text[:first] for turns in found for first, _ in turns.spans]
    assert len(said) == len(at)
    for index, before, answer in zip(at, seen, said, strict=True):
        (text,), (spans,) = _theirs(published["lfm2_5"], messages[: index + 1], None, return_assistant_tokens_mask=True)
        first, end = spans[-1]
        assert answer == text[first:end]
        assert before == _theirs(published["lfm2_5"], messages[:index], None, True)[0][0]
    if len(found) == 1:
        (text,), (spans,) = _theirs(published["lfm2_5"], messages[: at[-1] + 1], None, return_assistant_tokens_mask=True)
        assert found[0].text == text
        assert list(found[0].spans) == spans


@hypothesis.settings(max_examples=2, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(st.lists(st.builds(Conversation, conversations(plain_answers), tools), min_size=20, max_size=30))
def test_published_templates_run_as_they_are_give_the_same_answers(published, several):
    """Every template in one process for all conversations, and symbols that messages spell parted alike."""
    spelled = Conversation([{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "<|im_start|>a<|"}])
    several = [*several, spelled]
    for name, source in published.items():
        theirs = JinjaTemplate(source=source, name=name)
        assert render_turns(several, theirs) == render_turns(several, CHAT_FORMATS[name])
        assert render_prompts(several, theirs) == render_prompts(several, CHAT_FORMATS[name])


THINKS = [
    {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2", "thinking": "one and one"},
    {"role": "tool", "content": "right"}, {"role": "assistant", "content": "Good.", "thinking": "it is right"},
    {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "thinking": "two and two"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "answers_of_texts"), [("lfm2", [3]), ("lfm2_5", [2, 1]), ("lfm2_5_instruct", [2, 1])]
)
def test_where_a_template_forgets_another_text_begins(name, answers_of_texts):
    """LFM2.5 forgets with the next question, LFM2.5-Instruct with the answer after the next."""
    (found,) = render_turns([Conversation(THINKS)], CHAT_FORMATS[name])
    assert [len(turns.spans) for turns in found] == answers_of_texts
    said = [turns.text[first:end] for turns in found for first, end in turns.spans]
    assert said == [
        "<think>one and one</think>2<|im_end|>\n", "<think>it is right</think>Good.<|im_end|>\n",
        "<think>two and two</think>4<|im_end|>\n",
    ]  # fmt: skip
    kept = {"lfm2": ["one and one", "it is right"], "lfm2_5": [], "lfm2_5_instruct": ["it is right"]}[name]
    before = found[-1].text[: found[-1].spans[-1][0]]
    assert [thought for thought in ("one and one", "it is right") if thought in before] == kept
