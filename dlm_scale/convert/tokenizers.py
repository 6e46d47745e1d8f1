"""Tokenizers of ours as the files of Hugging Face's fast tokenizers: the same ids for the same text."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dlm_scale.convert.source import Model
from dlm_scale.data.chat import CHATML
from dlm_scale.data.optional import import_optional
from dlm_scale.data.tokenizer import (
    CHAR_FILE,
    GPT2_FILE,
    GPT2_RANKS,
    HF_FILE,
    Tokenizer,
    complete_hf,
    load_tokenizer,
)

MASK_NAME, CHAT_FILE = "<|mask|>", "chat_template.jinja"


def tokenizer_files(model: Model) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and a chat template where there is one; nothing without a tokenizer."""
    if model.meta.tokenizer.kind == "none":
        return {}
    with TemporaryDirectory() as folder:
        for name in model.meta.tokenizer.files:
            (Path(folder) / name).write_bytes(model.documents[name])
        tokenizer = load_tokenizer(folder, model.meta)
    bpe, named = BUILDERS[tokenizer.kind](tokenizer)
    template = model.documents.get(CHAT_FILE, CHATML.encode() if "<|im_start|>" in tokenizer.special_ids else None)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.shape.seq_len,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": list(tokenizer.special_ids),
        **named,
    }
    files = {HF_FILE: bpe.to_str(pretty=True).encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode()}
    return files if template is None else files | {CHAT_FILE: template}


def _library() -> Any:
    return import_optional("tokenizers", "the export of a tokenizer")


def _with_specials(bpe: Any, tokenizer: Tokenizer, before: tuple[str, ...] = ()) -> tuple[Any, dict[str, str]]:
    """Special tokens behind those of text, in the order of their ids, and the mask last."""
    added = [_library().AddedToken(name, special=True, normalized=False)
             for name in (*before, *tokenizer.special_ids, MASK_NAME)]  # fmt: skip
    bpe.add_special_tokens(added)
    assert bpe.token_to_id(MASK_NAME) == tokenizer.vocabulary.mask_id
    return bpe, {"mask_token": MASK_NAME, **({"eos_token": before[0]} if before else {})}


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for a byte: itself where it is visible, else one from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def _byte(tokenizer: Tokenizer) -> tuple[Any, dict[str, str]]:
    library = _library()
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    bpe = library.Tokenizer(library.models.BPE(vocabulary, []))
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = library.decoders.ByteLevel()
    return _with_specials(bpe, tokenizer)


def _char(tokenizer: Tokenizer) -> tuple[Any, dict[str, str]]:
    library = _library()
    characters = json.loads(tokenizer.files[CHAR_FILE])
    model = library.models.WordLevel({character: i for i, character in enumerate(characters)})
    bpe = library.Tokenizer(model)
    bpe.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
    bpe.decoder = library.decoders.Fuse()
    return _with_specials(bpe, tokenizer)


def _gpt2(tokenizer: Tokenizer) -> tuple[Any, dict[str, str]]:
    library, shown = _library(), byte_characters()
    ranks = {
        base64.b64decode(token): int(rank) for token, rank in map(bytes.split, tokenizer.files[GPT2_FILE].splitlines())
    }
    vocabulary = {"".join(shown[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [tuple("".join(shown[byte] for byte in part) for part in _halves(token, ranks))
              for token in sorted(ranks, key=ranks.get) if len(token) > 1]  # fmt: skip
    bpe = library.Tokenizer(library.models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = library.decoders.ByteLevel()
    assert len(vocabulary) == GPT2_RANKS
    return _with_specials(bpe, tokenizer, ("<|endoftext|>",))


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens that merge into this one: what the merges of lower rank make of its bytes."""
    parts, own = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, own) for left, right in zip(parts, parts[1:])]
        place = pairs.index(min(pairs))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _hf(tokenizer: Tokenizer) -> tuple[Any, dict[str, str]]:
    bpe, _, eos_id, mask_id = complete_hf(tokenizer.files)
    return bpe, {"mask_token": bpe.id_to_token(mask_id), "eos_token": bpe.id_to_token(eos_id)}


BUILDERS: dict[str, Callable[[Tokenizer], tuple[Any, dict[str, str]]]] = {
    "byte": _byte, "char": _char, "gpt2": _gpt2, "hf": _hf,
}  # fmt: skip
