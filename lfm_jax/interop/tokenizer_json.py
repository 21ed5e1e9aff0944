"""SentencePiece models as tokenizer.json, the format of Hugging Face's tokenizers.

SentencePiece's BPE joins, over the whole text, the adjacent pair whose union is the piece with the best score. The tokenizers
package joins by a ranked list of pairs; with every split of every piece in that list, in the order of the pieces' scores, and no
pre-tokenizer, the ids are the same. Both keep a heap of pairs, O(n log n) in the length of a text.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from lfm_jax.interop.huggingface_config import GenerationSettings

_SPACE = "\u2581"  # how SentencePiece writes a space
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

    processor = sentencepiece.SentencePieceProcessor(model_proto=epath.Path(model).read_bytes())
    ids = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(index) for index in ids]
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
        is copied as it is, with tokenizer_config.json, special_tokens_map.json and chat_template.jinja where they are beside it.
      folder: exists already.
      generation: the special ids.
    Returns:
      The number of ids.
    Raises:
      FileNotFoundError: `source` holds no tokenizer.
      ValueError: a SentencePiece model of another kind, an unreadable tokenizer.json, or a special id that the tokenizer does
        not have.
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
        text = source.read_text()
        beside = [source.parent / name for name in extras if (source.parent / name).exists()]
    else:
        text, beside = sentencepiece_to_tokenizer(source, generation.bos_id).to_str(), []
    (folder / "tokenizer.json").write_text(text)
    for file in beside:
        file.copy(folder / file.name)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is no JSON: {error}") from error
    if not (folder / "tokenizer_config.json").exists():
        _write_settings(folder, _tokens(content), generation)
    return tokenizer_json_size(content)


def tokenizer_json_size(content: Mapping[str, Any]) -> int:
    """The highest id of a tokenizer.json, plus one."""
    return max(_tokens(content)) + 1


def _tokens(content: Mapping[str, Any]) -> dict[int, str]:
    model = content.get("model") if isinstance(content, Mapping) else None
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, Mapping) or not vocab:
        raise ValueError("tokenizer.json has no model.vocab that maps tokens to ids; only BPE and WordPiece models are read")
    added = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    return {index: token for token, index in vocab.items()} | added


def _write_settings(folder: epath.Path, tokens: Mapping[int, str], generation: GenerationSettings) -> None:
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
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
