"""SentencePiece models as tokenizer.json, the format of Hugging Face's tokenizers.

SentencePiece's BPE joins, over the whole text, the adjacent pair whose union is the piece with the best score. The tokenizers
package joins by a ranked list of pairs; with every split of every piece in that list, in the order of the pieces' scores, and no
pre-tokenizer, the ids are the same. Both keep a heap of pairs, O(n log n) in the length of a text.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from lfm_jax.interop.chat_template import read_template
from lfm_jax.interop.foreign import check_tokenizer
from lfm_jax.interop.huggingface_config import GenerationSettings
from lfm_jax.isolation.limits import Limits, call_limited

_SPACE = "\u2581"  # how SentencePiece writes a space
# The largest published ones have 35 MB. As objects of Python, JSON takes up to 24 times its bytes.
_MOST_BYTES = 1 << 26
_MOST_IDS = 1 << 24
_LIMITS = Limits(cpu_seconds=8, seconds=60, memory_bytes=1 << 31)
# Digests of the files that have been looked at, and their numbers of ids: a run reads its tokenizer more than once.
_CHECKED: dict[str, int] = {}
# What conversion must get right; a model of another kind (unigram, another normalization, a dummy prefix) fails on some of it.
_PROBES = (
    "a b", " leading", "trailing ", "two  spaces,   three", "\ttab\nline\r\nend", "caf\u00e9 cafe\u0301 \ufb01 \u2460",
    "\U0001f469\u200d\U0001f4bb", "def f(x):\n    return x[0] + 1234567", "\u4f60\u597d\u3000\u4e16\u754c", "ABC abc 0x7f <0x0A>",
    "    ", "aaaaaaaaa bababab",
)  # fmt: skip

# The LFM2 chat format: the beginning-of-text token, then a marked turn for each message. Tools are listed in the system turn and
# what they answer is wrapped in the response tokens.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set first = 1 if messages and messages[0].role == "system" else 0 -%}
{%- set ns = namespace(system=messages[0].content if first else "", tools="") -%}
{%- for tool in tools or [] -%}
    {%- set ns.tools = ns.tools + (", " if ns.tools else "") + (tool if tool is string else tool | tojson) -%}
{%- endfor -%}
{%- if ns.tools -%}
    {%- set separator = "\\n" if ns.system else "" -%}
    {%- set ns.system = ns.system + separator + "List of tools: <|tool_list_start|>[" + ns.tools + "]<|tool_list_end|>" -%}
{%- endif -%}
{%- if ns.system -%}
    {{- "<|im_start|>system\\n" + ns.system + "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages[first:] -%}
    {%- set content = message.content if message.content is string else message.content | tojson -%}
    {%- if message.role == "tool" -%}
        {%- set content = "<|tool_response_start|>" + content + "<|tool_response_end|>" -%}
    {%- endif -%}
    {{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


def sentencepiece_to_tokenizer(model: epath.PathLike, bos_id: int):
    """A SentencePiece BPE model as a `tokenizers.Tokenizer` that gives the same ids, behind one beginning-of-text token.

    Two differences: the text of a control symbol ("<|im_end|>") becomes that symbol, as chat templates need it, where
    SentencePiece spells it out; and a run of byte pieces that is no UTF-8 decodes to replacement characters, its valid part too.

    Args:
      model: the .model file; BPE with byte fallback, identity normalization, no dummy prefix.
      bos_id: the token that `encode` puts in front of a text.
    Raises:
      ValueError: the model is of another kind.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=epath.Path(model).read_bytes())
    except (RuntimeError, UnicodeDecodeError) as error:  # the second: of a message that quotes what is no text
        raise ValueError(f"{model} is no SentencePiece model: {error}") from error
    ids = range(processor.get_piece_size())
    pieces = check_pieces(processor, str(model))
    if sum(processor.is_byte(index) for index in ids) != 256:
        raise ValueError(f"{model} was trained without byte fallback, so some text has no ids; train it with byte_fallback=True")
    control = [index for index in ids if processor.is_control(index)]
    if bos_id not in control:
        raise ValueError(f"bos_id {bos_id} is no control symbol of {model}; those are {control}")
    kinds = (processor.is_control, processor.is_unknown, processor.is_byte, processor.is_unused)
    normal = {piece: index for index, piece in enumerate(pieces) if not any(is_kind(index) for is_kind in kinds)}
    best_first = sorted(normal, key=lambda piece: (-processor.get_score(normal[piece]), normal[piece]))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    bpe = models.BPE(vocab, _merges(best_first), unk_token=processor.id_to_piece(processor.unk_id()), byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback()])
    tokenizer.add_special_tokens([AddedToken(pieces[index], normalized=False, special=True) for index in control])
    bos = pieces[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    for probe in _PROBES:
        if tokenizer.encode(probe, add_special_tokens=False).ids != processor.encode(probe):
            raise ValueError(
                f"{model} is no BPE model with identity normalization, without dummy prefix and with spaces kept as they are: it "
                f"encodes {probe!r} otherwise than its pieces say; train it with the settings of data_pipelines"
            )
    return tokenizer


def check_pieces(processor: Any, name: str) -> list[str]:
    """The pieces of a `sentencepiece.SentencePieceProcessor`, by id. name: of its file, for messages.

    Raises:
      ValueError: a piece is no UTF-8. The package loads such a model, and fails when it comes to decode that piece.
    """
    pieces = []
    try:
        for index in range(processor.get_piece_size()):
            pieces.append(processor.id_to_piece(index))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is damaged: piece {len(pieces)} is no UTF-8 ({error.reason}); fetch it again") from error
    return pieces


def _merges(best_first: Iterable[str]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the best piece first."""
    known = set(best_first := list(best_first))
    return [
        (piece[:cut], piece[cut:])
        for piece in best_first
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def write_tokenizer(source: epath.PathLike, folder: epath.PathLike, generation: GenerationSettings) -> int:
    """Writes the tokenizer files that `AutoTokenizer` and other readers look for.

    Args:
      source: a SentencePiece model, a tokenizer.json, or a folder that holds tokenizer.model or tokenizer.json. A tokenizer.json
        is checked (see `read_tokenizer_json`) and copied as it is, with tokenizer_config.json, special_tokens_map.json and
        chat_template.jinja where they are beside it. What has no such settings to be copied gets some, with the chat template
        that is beside it (see `read_template`), or else that of LFM2.
      folder: exists already.
      generation: the special ids.
    Returns:
      The number of ids.
    Raises:
      FileNotFoundError: `source` holds no tokenizer.
      ValueError: a SentencePiece model of another kind, an unreadable tokenizer.json or chat template, a tokenizer_config.json
        that asks for code from its folder, or a special id that the tokenizer does not have.
    """
    source, folder = epath.Path(source), epath.Path(folder)
    if source.is_dir():
        inside = [source / name for name in ("tokenizer.model", "tokenizer.json") if (source / name).exists()]
        if not inside:
            raise FileNotFoundError(f"{source} holds neither tokenizer.model nor tokenizer.json")
        source = inside[0]
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing; expected a SentencePiece model or a tokenizer.json")
    extras = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    if source.suffix == ".json":
        data, beside = source.read_bytes(), [source.parent / name for name in extras if (source.parent / name).exists()]
        size = read_tokenizer_json(data, str(source))
        for file in beside:
            _check_no_code(file)
            file.copy(folder / file.name)
    else:
        data = sentencepiece_to_tokenizer(source, generation.bos_id).to_str().encode()
        size = tokenizer_json_size(json.loads(data), str(source))
    (folder / "tokenizer.json").write_bytes(data)
    if not (folder / "tokenizer_config.json").exists():
        template, _ = read_template(source)
        _write_settings(folder, _tokens(json.loads(data), str(source)), generation, template or CHAT_TEMPLATE)
    return size


def read_tokenizer_json(data: bytes, name: str) -> int:
    """Checks the content of a tokenizer.json from anywhere; returns its number of ids, the highest plus one.

    The tokenizers package can end the process that reads a file: one of 13 KB makes it ask for all the memory there is. So each
    file is first read, and text encoded with it, in a process with limits; it takes 0.1 seconds, 0.5 for 65,536 ids and 2 for
    256,000 (docs/benchmarks/outside_files.md), and of the same bytes happens once.

    Args:
      name: of the file, for messages.
    Raises:
      LimitError: it takes more than 8 seconds of processor time or 2 GiB.
      ValueError: no JSON, not a BPE or WordPiece model, two tokens with one id, ids that no model has, or tokenizers cannot read
        it or reads other ids than are written there.
    """
    digest = hashlib.sha256(data).hexdigest()
    if digest not in _CHECKED:
        if len(data) > _MOST_BYTES:
            raise ValueError(f"{name} has {len(data)} bytes, more than {_MOST_BYTES}: that is no tokenizer")
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is no JSON: {error}") from error
        size = tokenizer_json_size(content, name)
        ids = content["model"]["vocab"].values()
        if len(set(ids)) < len(ids):
            raise ValueError(f"{name} gives {len(ids) - len(set(ids))} of its ids to two tokens, so text would not survive")
        found = call_limited(check_tokenizer, data, name=name, limits=_LIMITS)
        if found != size:
            raise ValueError(f"{name} has ids below {size}, but tokenizers reads it as having ids below {found}; it is damaged")
        _CHECKED[digest] = size
    return _CHECKED[digest]


def tokenizer_json_size(content: Any, name: str) -> int:
    """The highest id of a tokenizer.json, plus one. name: of the file, for messages."""
    return max(_tokens(content, name)) + 1


def _tokens(content: Any, name: str) -> dict[int, str]:
    model = content.get("model") if isinstance(content, Mapping) else None
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, Mapping) or not vocab:
        raise ValueError(f"{name} has no model.vocab that maps tokens to ids; only BPE and WordPiece models are read")
    try:
        added = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
        tokens = {index: token for token, index in vocab.items()} | added
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{name} has added_tokens or a vocab without ids and texts ({error!r}); it is damaged") from error
    wrong = [index for index in tokens if type(index) is not int or not 0 <= index < _MOST_IDS]
    if wrong:
        raise ValueError(f"{name} has the id {wrong[0]!r:.40}; ids are whole numbers below {_MOST_IDS}, so it is damaged")
    return tokens


def _check_no_code(file: epath.Path) -> None:
    """Refuses settings with `auto_map`, by which transformers may run a file that lies beside them."""
    if file.suffix != ".json":
        return
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if isinstance(content, Mapping) and "auto_map" in content:
        raise ValueError(f"{file} has auto_map, which asks readers to run code from its folder; remove the entry to use it")


def _write_settings(folder: epath.Path, tokens: Mapping[int, str], generation: GenerationSettings, template: str) -> None:
    named = {"bos_token": generation.bos_id, "eos_token": generation.eos_ids[0], "pad_token": generation.pad_id}
    for name, index in named.items():
        if index not in tokens:
            raise ValueError(f"{name} is id {index}, which the tokenizer of {max(tokens) + 1} ids does not have")
    special = {name: tokens[index] for name, index in named.items()}
    settings = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
