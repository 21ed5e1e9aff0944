"""Tool calls: read as they are meant, written so that they are read back, judged as BFCL's checker judges them."""

import collections
import json
import random

import hypothesis
import jinja2
import pytest
from hypothesis import strategies

from data_pipelines.tasks.tool_calls import Call, Parsed, call_error, parse, score_calls, write

START, END = "<|tool_call_start|>", "<|tool_call_end|>"
LFM3 = "<tool_call><function={}>{}</function></tool_call>"


def block(text: str) -> str:
    return f"{START}{text}{END}"


def tool(name: str, required=(), **kinds) -> dict:
    properties = {key: {"type": kind} if isinstance(kind, str) else kind for key, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


# The outputs of real models that vllm#48171 and mlx-lm#1246 collected, and what they mean.
KNOWN_FAILURES = {
    "a bracket in a string": ("""exec(command='grep -F "]" log.txt')""", {"command": 'grep -F "]" log.txt'}),
    "raw line ends": ("exec(command='cat > f << EOF\nimport csv\r\nEOF')", {"command": "cat > f << EOF\nimport csv\r\nEOF"}),
    "a backslash at the end": (r"exec(content='pattern \\')", {"content": "pattern \\"}),
    "a single backslash at the end": ("exec(path='C:\\dir\\', n=1)", {"path": "C:\\dir\\", "n": 1}),
    "a backslash that is no escape": (r"exec(pattern='\d+\.\w \x4 \u12')", {"pattern": r"\d+\.\w \x4 \u12"}),
    "octal escapes and none": (r"exec(a='\400 \777 \101 \0 \8')", {"a": "\\400 \\777 A \0 \\8"}),
    "a negative number": ("exec(longitude=-74.0046539, up=+1, down=- 2)", {"longitude": -74.0046539, "up": 1, "down": -2}),
    "a tuple": ("exec(size=(800, 600))", {"size": [800, 600]}),
    "a set": ("exec(tags={'urgent', 'bug'})", {"tags": ["urgent", "bug"]}),
    "keywords of Python": ("exec(from=1, class='a', lambda=2, import=3)", {"from": 1, "class": "a", "lambda": 2, "import": 3}),
    "constants of JSON": (
        'exec(a=true, b=false, c=null, d={"e": [true, null]}, f=None, g=True)',
        {"a": True, "b": False, "c": None, "d": {"e": [True, None]}, "f": None, "g": True},
    ),
    "leading zeros": ("exec(month=07, day=-05, a=0, half=0.5, e=1e05)", {"month": 7, "day": -5, "a": 0, "half": 0.5, "e": 1e5}),
    "a byte of zero": ("exec(command='printf a\0b')", {"command": "printf a\0b"}),
    "quotes within the same quotes": (
        "exec(command='sed -n '360,450p' /testbed/matrices.py')", {"command": "sed -n '360,450p' /testbed/matrices.py"},
    ),
    "a program within quotes": (
        "exec(command='python3 -c \"from sympy import latex\nprint(latex(3*x, mul_symbol='\\,'))\"')",
        {"command": "python3 -c \"from sympy import latex\nprint(latex(3*x, mul_symbol='\\,'))\""},
    ),
    "an apostrophe": ("exec(text='it's his, then', n=2)", {"text": "it's his, then", "n": 2}),
    "escaped quotes": (r"""exec(city='Martha\'s Vineyard', unit='"cool"')""", {"city": "Martha's Vineyard", "unit": '"cool"'}),
    "strings in a row": ("exec(a='b' \"c\"\n'd')", {"a": "bcd"}),
    "three quotes": ("exec(code='''a = 'b'\nprint(\"c\")''')", {"code": "a = 'b'\nprint(\"c\")"}),
    "nested values": (
        "exec(items=[{'name': 'noodles', 'amount': 250, 'of': [[], {}, ()]}], note='')",
        {"items": [{"name": "noodles", "amount": 250, "of": [[], {}, []]}], "note": ""},
    ),
    "what looks like code": ("exec(a='f(x=1)', b='], [g()]', c='#')", {"a": "f(x=1)", "b": "], [g()]", "c": "#"}),
    "spaces and line ends": ("\n exec (\n a = 1 ,\n b = 'x',\n)\n", {"a": 1, "b": "x"}),
    "letters of the world": ("exec(naïve='中文 🙂', größe=1)", {"naïve": "中文 🙂", "größe": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOWN_FAILURES)
def test_toolcall_parser_cases(case):
    text, arguments = KNOWN_FAILURES[case]
    assert parse(block(f"[{text}]")) == Parsed([Call("exec", arguments)], "")
    # And with a sound call on either side.
    calls = [Call("f", {}), Call("exec", arguments), Call("f", {"x": "]"})]
    assert parse(block(f" [f(), {text}, f(x=']')] ")).calls == calls


@pytest.mark.parametrize("name", ["grocery.orderIngredients", "a.b.c", "get-weather", "print", "None", "météo"])
def test_names_with_dots_and_dashes(name):
    assert parse(block(f"[{name}(x=1)]")).calls == [Call(name, {"x": 1})]


def test_text_around_calls_is_kept():
    response = f"Let me see. {block('[f(x=1)]')} And {block(' [g(), h()]')}\nDone."
    assert parse(response) == Parsed([Call("f", {"x": 1}), Call("g", {}), Call("h", {})], "Let me see.  And \nDone.")
    assert parse("No calls [f(x=1)] here") == Parsed([], "No calls [f(x=1)] here")
    assert parse(block("[]")) == Parsed([], "")
    assert parse(block("f(x=1), g()")).calls == [Call("f", {"x": 1}), Call("g", {})]


MALFORMED = {
    "[f(1)]": "'f' has an argument without a name",
    "[f(x=1, x=2)]": "'f' has an argument twice",
    "[f(x=y)]": "'y' is no literal",
    "[f(x=g(y=1))]": "a call where a literal belongs",
    "[f(x=__import__('os'))]": "'f' has an argument without a name|a call where a literal belongs",
    "[f(x=1+1)]": "arithmetic",
    "[f(x=--1)]": "arithmetic",
    "[f(x=-'a')]": "arithmetic",
    "[f(x=2**3)]": "where a call or a literal belongs",
    "[f(x=a[0])]": "'a' is no literal",
    "[f(x=[1][0])]": "after a value",
    "[f(x=1)(y=2)]": "after a value",
    "[f(x='a' 1)]": "after a value",
    "[f(x=f'{y}')]": "'f' is no literal",
    "[f(x=b'a')]": "'b' is no literal",
    "[f(x=...)]": "where a call or a literal belongs",
    "[f(**{'x': 1})]": "where a call or a literal belongs",
    "[f(x={1: 2})]": "a mapping with a key that is no string",
    "[f(x=1e999)]": "a number beyond those of double precision",
    f"[f(x={'9' * 41})]": "a number of 41 characters",
    "[f(x='a)]": "a string without an end",
    "[f(x=1)": "no list of calls",
    "[f(x=1]": "no list of calls",
    "[f(x=)]": "no list of calls",
    "[f, g]": "'f' is no literal",
    "['f(x=1)']": "no list of calls",
    "": None,
    "[": "no list of calls",
    '[{"name": "f", "arguments": {}}]': "no list of calls",
    "f(x=1)]; import os; [f()": "where a call or a literal belongs",
    "[" * 33: "more than 32 brackets within each other",
    "[f(x=" + "[" * 31 + "]" * 31 + ")]": "more than 32 brackets within each other",
    "[f(x='" + "a" * (1 << 16) + "')]": "the calls have more than 65536 characters",
}


@pytest.mark.parametrize(("text", "error"), MALFORMED.items(), ids=range(len(MALFORMED)))
def test_malformed_calls_are_an_error_and_no_calls(text, error):
    parsed = parse(block(text))
    assert parsed.calls == []
    if error is None:
        assert parsed == Parsed([], "")
    else:
        assert any(words in parsed.error for words in error.split("|")), parsed.error
        assert parsed.text == block(text)


def test_marks_must_be_in_pairs():
    assert parse(f"a {START}[f()]").error == f"{START} without {END}"
    assert parse(f"a {END}").error == f"{END} without {START}"
    # LFM2 has been seen to write the body again (vllm's lfm2 parser).
    assert parse(f"{block('[f()]')}[f()]{END}").error == f"{END} without {START}"


def test_thirty_brackets_are_read():
    assert parse(block("[f(x=" + "[" * 29 + "]" * 29 + ")]")).error is None


@pytest.mark.parametrize(
    "text",
    [
        "[f(x=" + "[" * 10_000,
        "[f(x=" + "-" * 60_000 + "1)]",
        "[f(x=" + "1+" * 30_000 + "1)]",
        "[" + "f(" * 30_000,
        "[f" + "()" * 30_000 + "]",
        "[f(x=" + "a." * 30_000 + "a)]",
        "[" + "a." * 30_000 + "a()]",
        "[f(x=" + "'" * 60_000 + ")]",
        "[f(x='" + "' " * 30_000 + ")]",
        "[f(x='" + "\\" * 60_000 + ")]",
        "[f(x='" + "'," * 30_000 + ")]",
        "[f(x='" + "')" * 30_000 + "]",
        "[f(x=" + "1" * 60_000 + ")]",
        "[f(x=" + " " * 60_000,
        "[" + "f(x=1), " * 8_000 + "]",
        "[" + "f" * 60_000,
        "[f(x='\ud800')]",
        "x" * 1_000_000,
    ],
    ids=range(18),
)
def test_huge_and_deep_text_does_not_crash_the_interpreter(text):
    for whole in (text, block(text), block(text) * 20, START * 10_000 + text, END * 10_000 + text):
        parse(whole)
        parse(LFM3.format("f", f"<parameter=x>{whole}</parameter>"), "lfm3")
    parse("<tool_call>" * 5_000 + text, "lfm3")
    parse("<tool_call><function=f>" + "<parameter=a>" * 4_000, "lfm3")


def test_mutated_calls_never_raise():
    rng = random.Random(0)
    seeds = [block(f"[{text}]") for text, _ in KNOWN_FAILURES.values()]
    seeds += [LFM3.format("f", "<parameter=a>1</parameter><parameter=b>[1, {}]</parameter>")]
    alphabet = "'\"\\()[]{}=,:.-+ \n\0ft09_é\ud800<>|/"
    outcomes = collections.Counter()
    for _ in range(4000):
        text = list(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = rng.choices(alphabet, k=rng.randint(0, 3))
        for form in ("lfm2", "lfm3"):
            parsed = parse("".join(text), form)
            assert parsed.error is None or parsed.calls == []
            json.dumps(parsed, allow_nan=False)  # what is read is plain values of JSON
            outcomes[form, parsed.error is None] += 1
    assert min(outcomes.values()) > 100, outcomes  # neither all sound nor all broken


VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers(-(10**30), 10**30)
    | strategies.floats(allow_nan=False, allow_infinity=False) | strategies.text()
    | strategies.sampled_from(["<|tool_call_end|>", "')]", "\\", "\\'", "'''", "true", "\ud800", "1", "it's", "{}", "a\\\nb"]),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = strategies.sampled_from(["f", "get_weather", "a.b", "from", "True", "class", "x-y", "größe"])
CALLS = strategies.builds(Call, NAMES, strategies.dictionaries(NAMES, VALUES, max_size=3))


HARD = (END, START, "'", "\\", "\\'", "')]", "a\\\nb", "\"'", "1", "\ud800")


@hypothesis.given(strategies.lists(CALLS, max_size=3))
@hypothesis.example([Call("f", {"x": text, "y": {text: [text]}}) for text in HARD])
def test_what_is_written_is_read_back(calls):
    text = write(calls)
    assert parse(f"before {text} after") == Parsed(calls, "before  after")


SCHEMAS = [tool("f", (), text="string", number="integer", either={"type": ["string", "integer"]}, values="array", some="object")]
TAGGED = strategies.fixed_dictionaries(
    {},
    optional={
        "text": strategies.text() | strategies.sampled_from(["1", "null", "[", " a\n", "<b>", "</tool_call"]),
        "number": strategies.integers(-(10**20), 10**20),
        "values": strategies.lists(VALUES.filter(lambda value: "</" not in repr(value)), max_size=2),
        "some": strategies.dictionaries(strategies.text("ab{"), strategies.integers(0, 9), max_size=2),
    },
)


@hypothesis.given(strategies.lists(strategies.builds(Call, strategies.just("f"), TAGGED), max_size=3))
def test_what_is_written_as_tags_is_read_back(calls):
    text = write(calls, "lfm3", SCHEMAS)
    assert parse(f"a{text}b", "lfm3", SCHEMAS) == Parsed(calls, "ab")


def test_lfm3_form():
    """A block for each call, strings as they are, other values as JSON."""
    calls = [Call("get_weather", {"city": "São Paulo", "days": 3, "when": {"from": None}}), Call("ping", {})]
    text = (
        "<tool_call><function=get_weather><parameter=city>São Paulo</parameter><parameter=days>3</parameter>"
        '<parameter=when>{"from": null}</parameter></function></tool_call><tool_call><function=ping></function></tool_call>'
    )
    assert write(calls, "lfm3") == text
    assert parse(f"Well. {text}", "lfm3") == Parsed(calls, "Well. ")
    # With the line ends that Qwen3-Coder's template puts between the tags.
    spaced = text.replace("><function", ">\n<function").replace("><parameter", ">\n<parameter").replace("></", ">\n</")
    assert parse(spaced, "lfm3").calls == calls
    # Only a schema tells a string that looks like a number.
    digits = LFM3.format("f", "<parameter=text>12</parameter>")
    assert parse(digits, "lfm3").calls == [Call("f", {"text": 12})]
    assert parse(digits, "lfm3", SCHEMAS).calls == [Call("f", {"text": "12"})]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call></tool_call>", "no <function=NAME>...</function> in the block"),
        ("<tool_call>{'name': 'f'}</tool_call>", "no <function=NAME>...</function> in the block"),
        ("<tool_call><function=f>", "<tool_call> without </tool_call>"),
        ("</tool_call>", "</tool_call> without <tool_call>"),
        (LFM3.format("f", "x"), "'x' where <parameter=KEY>...</parameter> belongs"),
        (LFM3.format("f", "<parameter=a>1"), "'<parameter=a>1' where <parameter=KEY>...</parameter> belongs"),
        (LFM3.format("f", "<parameter=a>1</parameter>" * 2), "'f' has an argument twice"),
        (LFM3.format("f", f"<parameter=a>{'[' * 33}{']' * 33}</parameter>"), "more than 32 brackets within each other"),
        (LFM3.format("f", "<parameter=a>" + "x" * (1 << 16) + "</parameter>"), "the calls have more than 65536 characters"),
    ],
)
def test_malformed_tags_are_an_error(text, error):
    assert parse(text, "lfm3") == Parsed([], text, error)


@pytest.mark.parametrize("value", ["NaN", "[Infinity]", "1e999", "9" * 41, "[1", "word"])
def test_values_that_are_no_json_are_text(value):
    assert parse(LFM3.format("f", f"<parameter=a>{value}</parameter>"), "lfm3").calls == [Call("f", {"a": value})]


@pytest.mark.parametrize(
    ("call", "form"),
    [
        (Call("two words", {}), "lfm2"),
        (Call("f", {"a b": 1}), "lfm2"),
        (Call("f", {"x": float("nan")}), "lfm2"),
        (Call("f", {"x": (1, 2)}), "lfm2"),
        (Call("f", {"x": b"a"}), "lfm2"),
        (Call("f", {"x": 10**60}), "lfm2"),
        (Call("f", {"text": "a</parameter>"}), "lfm3"),
        (Call("f", {"other": "12"}), "lfm3"),
    ],
)
def test_calls_that_no_text_is_read_as_are_not_written(call, form):
    with pytest.raises(ValueError, match=f"calls must be what the form '{form}' can hold, got .*{call.name}"):
        write([call], form, SCHEMAS)


def test_writes_what_the_published_template_writes(published_data):
    """LFM2.5's template renders `tool_calls` of a message; where it needs no escapes, that is our text to the byte."""
    template = (published_data / "lfm_templates" / "LFM2.5-8B-A1B.jinja").read_text()
    template = template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    calls = [
        Call("get_weather", {"city": "São Paulo", "days": 3, "units": ["a", "b"], "exact": True, "at": None, "limit": -1.5}),
        Call("a.b", {"where": {"x": True, "y": [None, "z"], "from": "ü"}}),
        Call("ping", {}),
    ]
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": call._asdict()} for call in calls]}
    text = environment.from_string(template).render(messages=[{"role": "user", "content": "?"}, message], bos_token="")
    assert write(calls) in text
    assert parse(text).calls == calls


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_agrees_with_the_official_checker_of_bfcl(published_data):
    """Every verdict on every output that LFM2's format has, and the kind of error of all but one (a mapping's key).

    The format has no fences, and no calls outside of its marks: here all outputs stand within them. A fenced output would be
    right in BFCL's own format and is malformed in LFM2's.
    """
    folder = published_data / "bfcl"
    tools = {row["id"]: row["function"] for row in rows(folder / "BFCL_v4_simple_python.json")}
    answers = {row["id"]: row["ground_truth"] for row in rows(folder / "possible_answer" / "BFCL_v4_simple_python.json")}
    total, agree, kinds = collections.Counter(), collections.Counter(), collections.Counter()
    for row in rows(folder / "official_verdicts_simple_python.jsonl"):
        parsed = parse(block(row["response"]))
        scores = score_calls(parsed, answers[row["id"]], tools[row["id"]])
        total[row["variant"]] += 1
        agree[row["variant"]] += scores["correct"] == row["valid"]
        if len(parsed.calls) == 1:
            kinds[call_error(parsed.calls[0], answers[row["id"]][0], tools[row["id"]]) == row["error_type"]] += 1
    assert agree["fenced"] == 0
    assert {variant: count for variant, count in agree.items() if variant != "fenced"} == {
        variant: count for variant, count in total.items() if variant != "fenced"
    }
    published = json.loads((folder / "reference_scores.json").read_text())["valid_over_total"]["simple_python"]
    assert total == {variant: count for variant, (_, count) in published.items()}
    assert kinds[False] <= 1, kinds


WEATHER = tool("weather", ("city",), city="string", days="integer", at="number", tags={"type": "array"}, of="object")
TIME = tool("time", ("city",), city="string", utc="boolean")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"city": "Paris"}, None),
        ({"city": "PARIS."}, None),
        ({"city": "Paris", "days": 2}, None),
        ({"city": "Paris", "at": 1}, None),
        ({"city": "Paris", "at": 1.0, "tags": ["A", "b-c"], "of": {"x": 1}}, None),
        ({"city": "Rome"}, "value_error:string"),
        ({"city": 1}, "type_error:simple"),
        ({}, "simple_function_checker:missing_required"),
        ({"city": "Paris", "days": 3}, "value_error:others"),
        ({"city": "Paris", "days": 2.0}, "type_error:simple"),
        ({"city": "Paris", "days": True}, "type_error:simple"),
        ({"city": "Paris", "tags": ["a"]}, "value_error:list/tuple"),
        ({"city": "Paris", "of": {"x": 1, "y": 2}}, "value_error:dict_value"),
        ({"city": "Paris", "of": {}}, "value_error:dict_value"),
        ({"city": "Paris", "other": 1}, "simple_function_checker:unexpected_param"),
    ],
)
def test_one_call_by_the_rules_of_bfcl(given, error):
    wanted = {"weather": {"city": ["Paris"], "days": [2, ""], "at": [1, ""], "tags": [["a", "bc"], ""], "of": [{"x": [1]}, ""]}}
    assert call_error(Call("weather", given), wanted, [TIME, WEATHER]) == error


def test_an_optional_argument_that_must_be_given():
    wanted = {"weather": {"city": ["Paris"], "days": [2]}}
    assert call_error(Call("weather", {"city": "Paris"}), wanted, [WEATHER]) == "simple_function_checker:missing_optional"
    assert call_error(Call("time", {"city": "Paris"}), wanted, [WEATHER]) == "simple_function_checker:wrong_func_name"


PARIS, ROME = {"weather": {"city": ["Paris"], "days": [2, ""]}}, {"weather": {"city": ["Rome"], "days": [2, ""]}}


@pytest.mark.parametrize(
    ("text", "wanted", "correct", "format_", "name", "arguments"),
    [
        ("[weather(city='Paris')]", [PARIS], 1, 1, 1, 1),
        ("[weather(city='Rome'), weather(city='Paris')]", [PARIS, ROME], 1, 1, 1, 1),
        # A half-right call must not take the place of the right one.
        ("[weather(city='Rome', days=2), weather(city='Paris', days=9)]", [PARIS, ROME], 0, 1, 1, 0.75),
        ("[weather(city='Paris')]", [PARIS, ROME], 0, 1, 0.5, 0.5),
        ("[weather(city='Paris'), weather(city='Paris')]", [PARIS], 0, 1, 0.5, 0.5),
        ("[weather(city='Oslo')]", [PARIS], 0, 1, 1, 0.5),
        ("[weather(city='Paris', more=1)]", [PARIS], 0, 1, 1, 2 / 3),
        ("[time(city='Paris')]", [PARIS], 0, 1, 0, 0),
        ("[weather(city='Paris'", [PARIS], 0, 0, 0, 0),
        ("[]", [PARIS], 0, 0, 0, 0),
        ("[weather(city='Paris')]", [], 0, 0, None, None),
    ],
)
def test_scores_of_calls(text, wanted, correct, format_, name, arguments):
    scores = score_calls(parse(block(text)), wanted, [TIME, WEATHER])
    assert scores == {"correct": correct, "format": format_, "name": name, "arguments": pytest.approx(arguments)}


@pytest.mark.parametrize(("text", "correct"), [("None of them fits.", 1), ("", 0), (" \n", 0), (START, 0), ("x" + END, 0)])
def test_words_where_no_call_is_wanted(text, correct):
    assert score_calls(parse(text), [], [TIME])["correct"] == correct
