"""What the formats of `outside_formats` share: what a format is, and damages that suit several."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath


class Format(NamedTuple):
    """A format.

    make: writes a sample into a folder, of which `file` is then changed; None: any file of it. read: what our reader makes of the
    folder, as text that is the same for the same meaning. digest: whether something in the folder says which bytes are right,
    so that a different result is a silent fault. marker: what an error's text must contain, to say where the fault is.
    crafted: name -> the sample's bytes to other bytes.
    """

    make: Callable[[epath.Path], None]
    file: str | None
    read: Callable[[epath.Path], str]
    digest: bool
    marker: str
    crafted: Mapping[str, Callable[[bytes], bytes]]


def always(data: bytes | str) -> Callable[[bytes], bytes]:
    """These bytes, whatever the sample's are."""
    return lambda _: data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")


def digest_of(parts: Any) -> str:
    """A text that is the same for the same parts: bytes, or what has a text."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def edited(**changes: Any) -> Callable[[bytes], bytes]:
    """Sets fields of a JSON object; None removes one."""
    return lambda data: json.dumps(
        {key: value for key, value in {**json.loads(data), **changes}.items() if value is not None}
    ).encode()  # fmt: skip


JSON_CASES = {
    "deep": always("[" * 200_000), "deep_objects": always('{"a":' * 200_000), "a_million_digits": always("9" * 1_000_000),
    "a_list": always("[]"), "null": always("null"), "nan": always("NaN"), "empty": always(""), "empty_object": always("{}"),
    "no_utf8": always(b'{"\xff": 1}'), "hundred_megabytes": lambda _: b"[" + b"{}," * 33_000_000 + b"{}]",
}  # fmt: skip
