"""Tokenizers as llama.cpp reads them from a GGUF file: the text of each id, and what its own code needs to split text alike.

llama.cpp takes neither normaliser nor regular expression from the file: it knows a fixed list of tokenizers by name. Two are
written. What SentencePiece's BPE does is its "llama" tokenizer (llm_tokenizer_spm in src/llama-vocab.cpp), which joins the
adjacent pair whose union has the best score. Byte-level BPE is its "gpt2" tokenizer, together with the pre-tokenizer whose
expression is the one in tokenizer.json. What neither would split alike is refused.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from etils import epath

from lfm_jax.interop.huggingface_config import GenerationSettings
from lfm_jax.interop.tokenizer_json import CHAT_TEMPLATE, write_tokenizer

# Types of tokens (gguf.TokenType).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "\u2581"
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_FILL_IN = {"fim_pre": "<|fim_pre|>", "fim_suf": "<|fim_suf|>", "fim_mid": "<|fim_mid|>"}
# Each ends a generation there.
_ENDS = ("eos", "eot", "eom")
# The expressions of the tokenizers of LFM2 (and Llama 3) and of Qwen 2; GPT-2's is built into the tokenizers package.
_LFM2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LFM2.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2, _DIGITS = "that of GPT-2", "single digits, then that of GPT-2"
# Name there: for tokenizers that take a word which is a token as it is, and for those that only join by their merges.
_PRE_TOKENIZERS = {_LFM2: ("lfm2", "smaug-bpe"), _QWEN2: (None, "qwen2"), _GPT2: (None, "gpt-2"), _DIGITS: (None, "smollm")}
_ADVICE = "export a Hugging Face folder instead (export_folder), or train the model with a tokenizer of data_pipelines"


class Vocabulary(NamedTuple):
    """The tokenizer in a GGUF file.

    model, pre: names of llama.cpp's tokenizer and pre-tokenizer. tokens, types: of each id. scores: of each id, for "llama".
    merges: pairs in the order of their rank, for "gpt2". special: ids by the names of their keys ("bos", "eos", ...).
    suppressed: ids below the highest that no token has. chat_template: None where there are no marks for turns.
    """

    model: Literal["llama", "gpt2"]
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    suppressed: list[int]
    chat_template: str | None


def read_vocabulary(source: epath.PathLike, generation: GenerationSettings) -> Vocabulary:
    """A tokenizer as llama.cpp needs it to give the same ids, behind one beginning-of-text token.

    Args:
      source: as in `write_tokenizer`. A chat template that lies beside it is taken along; else it is that of LFM2.
      generation: the special ids; each of up to three `eos_ids` ends a generation.
    Raises:
      FileNotFoundError: `source` holds no tokenizer.
      ValueError: it cannot be read, llama.cpp has no tokenizer that does the same, or a special id is not there.
    """
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(temporary)
        size = write_tokenizer(source, folder, generation)
        data = (folder / "tokenizer.json").read_bytes()
        template = _chat_template(folder)
    content, name = json.loads(data), str(source)
    tokens, types = _tokens(content, size, name)
    ids = {token: index for index, token in enumerate(tokens)}
    read = Tokenizer.from_str(data.decode()).get_vocab(with_added_tokens=True)
    moved = next((token for token, index in read.items() if ids.get(token) != index), None)
    if moved is not None:
        raise ValueError(f"{name} has {moved!r} as id {ids.get(moved)}, but tokenizers reads it as {read[moved]}; correct it")
    if content["model"].get("byte_fallback"):
        model, pre, merges = "llama", "default", []
        scores = _scores(content, tokens, types, ids, name)
    else:
        model, pre, scores = "gpt2", _pre_tokenizer(content, types, ids, name), []
        merges = [" ".join(_pair(merge)) for merge in content["model"]["merges"]]
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        special=_special(generation, types, ids, name),
        suppressed=[index for index, kind in enumerate(types) if kind == UNUSED],
        chat_template=CHAT_TEMPLATE if template is None and "<|im_start|>" in ids else template,
    )


def _chat_template(folder: epath.Path) -> str | None:
    """The template that transformers would take from the folder; of several that settings name, the default."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    template = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _tokens(content: Mapping[str, Any], size: int, name: str) -> tuple[list[str], list[int]]:
    """Text and type of each id."""
    model, added = content["model"], content.get("added_tokens") or []
    if "merges" not in model or any(model.get(field) for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError(f"{name} is no BPE without dropout, prefixes and suffixes, and llama.cpp knows no other; {_ADVICE}")
    texts = {index: text for text, index in model["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    if model.get("byte_fallback"):
        kinds |= {index: BYTE for index, text in texts.items() if text in _BYTES}
        kinds |= {index: UNKNOWN for index, text in texts.items() if text == model.get("unk_token")}
    for token in added:
        index, text = token["id"], token["content"]
        if texts.setdefault(index, text) != text:
            raise ValueError(f"{name} gives id {index} to {texts[index]!r} and to {text!r}; it is damaged")
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise ValueError(f"{name}: {text!r} takes spaces around it or stands alone, which llama.cpp cannot do; {_ADVICE}")
        kinds[index] = CONTROL if token.get("special") else USER_DEFINED
    # Where ids are missing, llama.cpp wants a text all the same.
    tokens = [texts.get(index, f"<|no token {index}|>") for index in range(size)]
    seen: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if seen.setdefault(text, index) != index:
            raise ValueError(f"{name} has the token {text!r} twice, as {seen[text]} and {index}, which ends llama.cpp; {_ADVICE}")
        if not text or "\0" in text:
            raise ValueError(f"{name}: token {index} is {text!r}; llama.cpp reads it as another one; {_ADVICE}")
    return tokens, [kinds.get(index, UNUSED) for index in range(size)]


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two parts of an entry of `merges`, in either of its two spellings."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _scores(
    content: Mapping[str, Any], tokens: list[str], types: list[int], ids: Mapping[str, int], name: str
) -> list[float]:
    """The score of each piece: the better, the earlier the merges make it. The way back from `sentencepiece_to_tokenizer`."""
    model = content["model"]
    pre_tokenizer, normalizer = content.get("pre_tokenizer"), content.get("normalizer")
    if normalizer != _SPACES or pre_tokenizer is not None or model.get("ignore_merges"):
        raise ValueError(
            f"{name} falls back to bytes and does more to a text than to write spaces as {_SPACE!r}, unlike llama.cpp (it has "
            f"normalizer {normalizer!r:.100} and pre_tokenizer {pre_tokenizer!r:.100}); {_ADVICE}"
        )
    if sum(kind == BYTE for kind in types) != len(_BYTES):
        raise ValueError(f"{name} falls back to bytes and lacks some of the 256, so that llama.cpp ends at some text; {_ADVICE}")
    merges = [_pair(merge) for merge in model["merges"]]
    order = list(dict.fromkeys(first + second for first, second in merges))
    known = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    splits = ((piece[:cut], piece[cut:]) for piece in order for cut in range(1, len(piece)))
    if merges != [split for split in splits if known.issuperset(split)] or not known.issuperset(order):
        raise ValueError(f"{name} joins some pieces before others that make the same piece, which scores cannot say; {_ADVICE}")
    ranks = {piece: rank for rank, piece in enumerate(order)}
    for token, kind in zip(tokens, types, strict=True):
        # Other than SentencePiece, llama.cpp joins pieces to whatever has their text.
        if kind == USER_DEFINED or token in ranks:
            continue
        parts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        joined = next((pair for pair in parts if pair[0] in ids and pair[1] in ids), None)
        if joined:
            raise ValueError(
                f"{name} has the pieces {joined[0]!r} and {joined[1]!r}, of which llama.cpp would make {token!r} wherever a text "
                f"spells it; {_ADVICE}"
            )
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _pre_tokenizer(content: Mapping[str, Any], types: list[int], ids: Mapping[str, int], name: str) -> str:
    """llama.cpp's name of what the tokenizer does to a text before it merges, and whether it merges what is a token already."""
    from tokenizers.pre_tokenizers import ByteLevel

    normalizer, model = content.get("normalizer"), content["model"]
    if normalizer is not None:
        raise ValueError(f"{name} changes text before it splits it ({normalizer!r:.100}), llama.cpp does not; {_ADVICE}")
    lacking = [character for character in ByteLevel.alphabet() if character not in ids]
    if lacking:
        raise ValueError(f"{name} lacks {len(lacking)} of the 256 bytes, which llama.cpp would leave out of a text; {_ADVICE}")
    expression = _expression(content.get("pre_tokenizer"))
    if expression not in _PRE_TOKENIZERS:
        known = "".join(f"\n  {expression}" for expression in _PRE_TOKENIZERS)
        raise ValueError(
            f"{name} splits text by a rule that is none of those known to be the same in llama.cpp; {_ADVICE}. The rule is "
            f"{content.get('pre_tokenizer')!r:.500}; known are{known}"
        )
    whole, joining = _PRE_TOKENIZERS[expression]
    ignores_merges = bool(model.get("ignore_merges"))
    if ignores_merges == (whole is not None):
        return whole or joining
    # Where the merges lead to every token, the other kind does the same, and its name is that of published files.
    stray = _stray(content, types, ids)
    if stray is None:
        return whole or joining
    if ignores_merges:
        raise ValueError(
            f"{name} takes words that are tokens as they are, also {stray!r}, to which no merges lead, and llama.cpp has no such "
            f"tokenizer for its expression; {_ADVICE}"
        )
    return joining


def _stray(content: Mapping[str, Any], types: list[int], ids: Mapping[str, int]) -> str | None:
    """A token to which no merges lead, or None."""
    from tokenizers import Tokenizer

    merging = Tokenizer.from_str(json.dumps({**content, "model": {**content["model"], "ignore_merges": False}})).model
    normal = ((token, index) for token, index in ids.items() if types[index] == NORMAL)
    return next((token for token, index in normal if [part.id for part in merging.tokenize(token)] != [index]), None)


def _expression(pre_tokenizer: Any) -> str | None:
    """By what a text is split before its bytes are merged; None: in a way that is not looked up."""
    parts = pre_tokenizer["pretokenizers"] if "pretokenizers" in (pre_tokenizer or {}) else [pre_tokenizer or {}]
    *first, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(first) > 1:
        return None
    inside = last.get("use_regex", True)
    if not first:
        return _GPT2 if inside else None
    (split,) = first
    if inside:
        return _DIGITS if split["type"] == "Digits" and split.get("individual_digits") else None
    if split["type"] != "Split" or split["behavior"] != "Isolated" or split.get("invert"):
        return None
    return split["pattern"].get("Regex")


def _special(generation: GenerationSettings, types: list[int], ids: Mapping[str, int], name: str) -> dict[str, int]:
    if len(generation.eos_ids) > len(_ENDS):
        raise ValueError(f"eos_ids has {len(generation.eos_ids)} ids; llama.cpp has keys for {len(_ENDS)} at which to end")
    special = {"bos": generation.bos_id, "padding": generation.pad_id, **dict(zip(_ENDS, generation.eos_ids, strict=False))}
    wrong = [(key, index) for key, index in special.items() if not 0 <= index < len(types) or types[index] == UNUSED]
    if wrong:
        raise ValueError(f"{wrong[0][0]} is id {wrong[0][1]}, which {name} does not have; its ids are below {len(types)}")
    special |= {key: ids[symbol] for key, symbol in _FILL_IN.items() if symbol in ids}
    if UNKNOWN in types:
        special["unknown"] = types.index(UNKNOWN)
    return special
