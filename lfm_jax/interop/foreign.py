"""What is done with files from outside in a process of its own (`lfm_jax.isolation.limits`): nothing of ours is imported here.

Functions of bytes, with results that JSON can hold.
"""

import json
from collections.abc import Callable
from typing import Any

# Text of many kinds, long enough that what grows faster than a text shows.
_PROBE = "".join(map(chr, [*range(32, 127), *range(0xA0, 0x250), *range(0x400, 0x460), *range(0x4E00, 0x4F00), 0x1F600, 0x200D]))
_PROBES = ("a", _PROBE, "word " * 2000, "a" * 2000, " " * 2000, "\n\t 0123456789\r\n" * 100, "def f(x):\n    return x[0]\n" * 100)
# A byte of a text gives one id at most; a tokenizer may put a few before and after.
_MOST_IDS_PER_BYTE = 4
_MOST_CHARACTERS = 300  # of a message


def check_tokenizer(data: bytes) -> int:
    """Loads a tokenizer.json and encodes text with it, as it stands and without padding; returns the highest id plus one.

    Raises:
      ValueError: tokenizers cannot read it, or text grows out of proportion, or gets an id that no token has.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the package raises no narrower class
        raise ValueError(f"cannot be used by tokenizers {tokenizers.__version__}: {error}") from error
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    tokenizer.encode(_PROBES[0])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for probe in _PROBES:
        ids = tokenizer.encode(probe).ids
        if len(ids) > _MOST_IDS_PER_BYTE * (len(probe.encode()) + 8):
            raise ValueError(f"makes {len(ids)} ids of {len(probe.encode())} bytes of text; it is damaged or hostile")
        if max(ids, default=0) > highest:
            raise ValueError(f"gives text the id {max(ids)}, but its highest token is {highest}")
    return highest + 1


def render_templates(data: bytes) -> list[dict[str, str]]:
    """Renders a chat template with several values. data: JSON of {"template": text, "shared": {...}, "values": [{...}, ...]}.

    As transformers does it (transformers/utils/chat_template_utils.py, `_compile_jinja_template`): a sandbox in which nothing can
    be changed, blocks without their line breaks, `break` and `continue`, and a few functions.

    Returns for each of the values, beside which the template reads the shared ones, {"text": ...}; or {"error": ...}, where the
    template refuses the messages, or does what it may not.

    Raises:
      ValueError: the template is none.
    """
    job = json.loads(data)
    template, found = _allowed(_environment().from_string, job["template"]), []
    for values in job["values"]:
        try:
            found.append({"text": _allowed(template.render, job["shared"] | values)})
        except ValueError as error:
            found.append({"error": str(error)[:_MOST_CHARACTERS]})
    return found


def _allowed(work: Callable[[Any], Any], argument: Any) -> Any:
    """`work(argument)`, with what jinja2 raises as a ValueError."""
    import jinja2

    try:
        return work(argument)
    except (jinja2.TemplateError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        raise ValueError(f"cannot be rendered ({type(error).__name__}: {error})") from error


def _environment() -> Any:
    import datetime

    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks what an assistant said, and shows it."""

        tags = {"generation"}

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """Without names that reach Python's own parts of an object."""

        def __init__(*arguments: Any, **names: Any):  # so that a name may be "self"
            self, *mappings = arguments
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*mappings, **names).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
        "dict": lambda *arguments, **names: dict(*arguments, **names),
        "namespace": Namespace,
    }
    return environment
