"""Tokenizers: a kind and the files it needs make one; both travel with every dataset and checkpoint.

Every kind takes text as text: names of special tokens inside a document are encoded as ordinary characters.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dlm_scale.data.files import parse_json, read_regular
from dlm_scale.data.meta import TokenizerFiles, TokenizerMeta, parse
from dlm_scale.data.optional import import_optional
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.errors import UsageError

GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_RANKS = 50256
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same without look-ahead, for which its engine takes twice as long, once a mark stands before the last of several
# white spaces that something follows: `\s+(?!\S)` leaves that one to the next alternative.
MARK = "\x01"
MARKED_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x01]+|\s+|\x01"""
WIDE_SPACES = "\x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
GPT2_FILE, CHAR_FILE, HF_FILE = "gpt2.tiktoken", "characters.json", "tokenizer.json"
SPECIAL_FILE = "special_tokens.json"
# Unicode's White_Space, which is what \s means in GPT2_PATTERN, in UTF-8
SPACES_OF_SEVERAL_BYTES = (
    rb"\xc2[\x85\xa0]",
    rb"\xe1\x9a\x80",
    rb"\xe2\x80[\x80-\x8a\xa8\xa9\xaf]",
    rb"\xe2\x81\x9f",
    rb"\xe3\x80\x80",
)
# Each alternative of GPT2_PATTERN ends where white space follows something else, and none looks back: cut there, the
# parts of a text have the ids of the whole.
WORD_END = rb"[!-~\x80-\xbf]" + b"".join(b"(?<!%s)" % s for s in SPACES_OF_SEVERAL_BYTES) + rb"(?=[\t-\r ])"
# for UTF-8, four bytes or more after the start of a stretch; the end of the match is the place
CUTS = {"character": re.compile(rb"(?=[^\x80-\xbf])"), "word": re.compile(WORD_END)}
MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>", "[MASK]", "<mask>", "<MASK>")
MAX_UNUSED_IDS = 1 << 16
SPECIAL_NAME, MAX_SPECIAL = re.compile(r"<[^\s<>]{1,62}>|\[[^\s\[\]]{1,62}\]"), 256
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")


@dataclass(frozen=True)
class Tokenizer:
    """`encode(text)` gives int64 ids [L]; `decode(ids, mask_char="_")` gives text, the mask shown as `mask_char`.

    `files` maps file name to content. `eos_id` separates documents, None where the kind has no separator. `cut` names
    the places (a key of CUTS) where a text may be cut so that the ids of its parts are those of the whole, None where
    none are known. `encode_compact` gives ids of whatever integer type is at hand. `special_ids` (name -> id) are
    tokens that no text is encoded to: a chat template writes them. `control_ids` are all ids that mark something and
    are no text, those among them.
    """

    kind: str
    vocabulary: Vocabulary
    eos_id: int | None
    files: Mapping[str, bytes]
    encode_compact: Callable[[str], np.ndarray]
    _decode: Callable[[np.ndarray, str], str]
    cut: str | None = None
    special_ids: Mapping[str, int] = field(default_factory=dict)
    control_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_compact(text).astype(np.int64)

    def decode(self, ids: Any, mask_char: str = "_") -> str:
        return self._decode(np.asarray(ids, dtype=np.int64).reshape(-1), mask_char)

    @property
    def hash(self) -> str:
        return _hash(self.kind, self.files)

    @property
    def meta(self) -> TokenizerMeta:
        v = self.vocabulary
        named = TokenizerFiles(self.kind, tuple(sorted(self.files)), self.hash)
        return TokenizerMeta(named, v.size, v.mask_id, v.suppressed_ids, self.eos_id)

    def save(self, folder: str | Path) -> list[str]:
        """Write its files into `folder`; returns their names."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)
        return sorted(self.files)


def make_tokenizer(spec: str, texts: Iterable[str] = (), special_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer that `--tokenizer` names; `char` takes its vocabulary from `texts` (read only then).

    spec: `byte`, `char`, `gpt2`, a GPT-2 `.tiktoken` ranks file, a Hugging Face `tokenizer.json` (or its folder).
    special_tokens: names to add behind the tokens of text; those that a tokenizer.json has keep their ids.
    Raises UsageError for anything else.
    """
    made = _make(spec, texts)
    if not special_tokens:
        return made
    special = json.dumps(_checked_names(special_tokens)).encode()
    return KINDS[made.kind][0]({**made.files, SPECIAL_FILE: special})


def _make(spec: str, texts: Iterable[str]) -> Tokenizer:
    path = Path(spec).expanduser()
    if spec == "byte":
        return _byte({})
    if spec == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return _char({CHAR_FILE: json.dumps("".join(sorted(characters))).encode()})
    if spec == "gpt2":
        return _gpt2({GPT2_FILE: _gpt2_ranks()})
    if path.suffix == ".tiktoken":
        return _gpt2({GPT2_FILE: _read(path)})
    if path.suffix == ".json" or (path / HF_FILE).is_file():
        return _hf({HF_FILE: _read(path / HF_FILE if path.is_dir() else path)})
    near = difflib.get_close_matches(spec, ("byte", "char", "gpt2"), 1)
    hint = f"Did you mean {near[0]!r}?" if near else "Give byte, char, gpt2, a .tiktoken file or a tokenizer.json"
    raise UsageError(f"--tokenizer {spec!r} is not a known tokenizer. {hint}")


def load_tokenizer(folder: str | Path, meta: Mapping[str, Any] | TokenizerMeta) -> Tokenizer:
    """Rebuild the tokenizer of a dataset or checkpoint folder, without network.

    meta: a dataset's meta, or (a superset of) its `tokenizer_dict()`. Raises UsageError where files and meta disagree.
    """
    if not isinstance(meta, TokenizerMeta):
        is_object = isinstance(meta, Mapping)
        known = {k: meta[k] for k in TokenizerMeta.__dataclass_fields__ if k in meta} if is_object else meta
        meta = parse(TokenizerMeta, known, f"{folder}: tokenizer meta")
    named = meta.tokenizer
    if named.kind not in KINDS:
        cause = "it was trained on synthetic tokens" if named.kind == "none" else f"kind {named.kind!r} is unknown"
        raise UsageError(f"{folder}: there is no tokenizer here that could read or write text: {cause}")
    build, names = KINDS[named.kind]
    names = tuple(sorted((*names, SPECIAL_FILE))) if SPECIAL_FILE in named.files else names
    files = {name: _read(Path(folder) / name) for name in names}
    if named.files == names and _hash(named.kind, files) == named.hash:
        made = build(files)
        if (made.vocabulary, made.eos_id) == (meta.vocabulary, meta.eos_id):
            return made
    raise UsageError(f"{folder}: its {named.kind} tokenizer {list(names)} is not the one that its meta describes")


def _hash(kind: str, files: Mapping[str, bytes]) -> str:
    """SHA-256 over the kind and its files, in name order."""
    digest = hashlib.sha256(kind.encode())
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise UsageError(f"tokenizer file {path}: {error.strerror}") from error


def _special_names(files: Mapping[str, bytes]) -> list[str]:
    if SPECIAL_FILE not in files:
        return []
    names = parse_json(files[SPECIAL_FILE], SPECIAL_FILE, "is not JSON")
    return _checked_names(parse(tuple[str, ...], names, SPECIAL_FILE))


def _checked_names(names: Iterable[str]) -> list[str]:
    names = list(names)
    odd = [name for name in names if not SPECIAL_NAME.fullmatch(name)]
    if odd or len(set(names)) < len(names) or len(names) > MAX_SPECIAL:
        cause = f"{odd[0]!r} is none" if odd else "one stands twice" if len(names) <= MAX_SPECIAL else "too many"
        raise UsageError(f"special tokens {names[:8]}: names in <...> or [...] without spaces, each once; {cause}")
    return names


def _finished(
    kind: str, num_text_ids: int, eos_id: int | None, files: Mapping[str, bytes], encode: Callable[[str], np.ndarray],
    decode: Callable[[np.ndarray], str], cut: str,
) -> Tokenizer:  # fmt: skip
    """A tokenizer whose ids are those of text, 0 ... num_text_ids - 1, then its special tokens, then the mask.

    `decode` takes ids of text alone; each run of them is decoded by itself.
    """
    special = {name: num_text_ids + number for number, name in enumerate(_special_names(files))}
    names = list(special)
    mask_id = num_text_ids + len(names)

    def decode_all(ids: np.ndarray, mask_char: str) -> str:
        places = np.flatnonzero(ids >= num_text_ids)
        runs = [run[run < num_text_ids] for run in np.split(ids, places)]
        shown = [mask_char if ids[place] == mask_id else names[ids[place] - num_text_ids] for place in places]
        return "".join(itertools.chain(*itertools.zip_longest(map(decode, runs), shown, fillvalue="")))

    control_ids = frozenset({mask_id, *special.values()} | ({eos_id} - {None}))
    vocabulary = Vocabulary(mask_id + 1, mask_id)
    return Tokenizer(kind, vocabulary, eos_id, files, encode, decode_all, cut, special, control_ids)


def _byte(files: Mapping[str, bytes]) -> Tokenizer:
    """256 bytes of UTF-8, then the mask; byte 0, which text does not hold, separates documents."""

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode(errors="replace")

    return _finished("byte", 256, 0, files, encode, decode, "character")


def _char(files: Mapping[str, bytes]) -> Tokenizer:
    """The characters of a text in code point order, then the mask."""
    characters = parse(str, parse_json(files[CHAR_FILE], CHAR_FILE, "is not JSON"), CHAR_FILE)
    if not characters:
        raise UsageError("the char tokenizer found no characters: the source holds no text")
    if list(characters) != sorted(set(characters)):
        raise UsageError(f"{CHAR_FILE} must hold each character once, in code point order")
    code_points = np.array([ord(c) for c in characters], dtype=np.uint32)

    def encode(text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = np.minimum(np.searchsorted(code_points, points), len(characters) - 1)
        unknown = np.flatnonzero(code_points[ids] != points)
        if unknown.size:
            named = repr(text[unknown[0]])
            raise UsageError(f"character {named} is not among the {len(characters)} of this char tokenizer")
        return ids

    def decode(ids: np.ndarray) -> str:
        return "".join(characters[i] for i in ids)

    return _finished("char", len(characters), None, files, encode, decode, "character")


def _gpt2(files: Mapping[str, bytes]) -> Tokenizer:
    """GPT-2's byte-level BPE (OpenAI, 2019): 50256 ranks, <|endoftext|>, then the mask."""
    digest = hashlib.sha256(files[GPT2_FILE]).hexdigest()
    if digest != GPT2_SHA256:
        raise UsageError(
            f"this .tiktoken file is not GPT-2's (sha256 {digest[:12]}..., not {GPT2_SHA256[:12]}...): a ranks file"
            " does not say how its text is split. Give GPT-2's, or that tokenizer's tokenizer.json"
        )
    tiktoken = import_optional("tiktoken", "the gpt2 tokenizer")
    pairs = (line.split() for line in files[GPT2_FILE].splitlines())
    ranks = {binascii.a2b_base64(token): int(rank) for token, rank in pairs}
    bpe, of_marked = (
        tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": GPT2_RANKS})
        for pattern in (GPT2_PATTERN, MARKED_PATTERN)
    )

    def encode(text: str) -> np.ndarray:
        if MARK in text or not text.isascii() and any(space in text for space in WIDE_SPACES):
            return bpe.encode_to_numpy(text, disallowed_special=())
        ids = of_marked.encode_to_numpy(_marked(text), disallowed_special=())  # uint32, no Python list on the way
        return ids[ids != ranks[MARK.encode()]]

    eos_id = GPT2_RANKS
    return _finished("gpt2", eos_id + 1, eos_id, files, encode, lambda ids: bpe.decode(ids.tolist()), "word")


def _marked(text: str) -> str:
    """A MARK before the last of several white spaces that something follows; all of them are of ASCII."""
    raw = np.frombuffer(text.encode(), dtype=np.uint8)
    is_space = (raw - np.uint8(9) < 5) | (raw == 32)
    at = np.flatnonzero(is_space[:-2] & is_space[1:-1] & ~is_space[2:]) + 1
    return np.insert(raw, at, ord(MARK)).tobytes().decode() if len(at) else text


def _gpt2_ranks() -> bytes:
    """GPT-2's ranks file from tiktoken's own cache, else from the network."""
    tiktoken = import_optional("tiktoken", "the gpt2 tokenizer")
    try:
        bpe = tiktoken.get_encoding("r50k_base")
    except OSError as error:
        raise UsageError(
            "--tokenizer gpt2: tiktoken has no copy of GPT-2's ranks and could not fetch one"
            f" ({type(error).__name__}). Give a local file: --tokenizer PATH/gpt2.tiktoken"
        ) from error
    lines = (base64.b64encode(bpe.decode_single_token_bytes(i)) + b" %d\n" % i for i in range(GPT2_RANKS))
    return b"".join(lines)


def _hf(files: Mapping[str, bytes]) -> Tokenizer:
    """A Hugging Face tokenizer.json; a mask or separator that it lacks is added behind its last id."""
    bpe, chat, eos_id, mask_id = complete_hf(files)
    bpe.encode_special_tokens = True
    ids = set(bpe.get_vocab().values())
    if len(ids) != len(bpe.get_vocab()):
        raise UsageError(f"{HF_FILE}: two of its tokens share an id; it has no room for a mask or separator token")
    size = max(ids) + 1
    if size - len(ids) > MAX_UNUSED_IDS:
        raise UsageError(f"{HF_FILE}: {len(ids)} tokens with ids up to {size - 1}: number them without such gaps")
    gaps = tuple(i for i in range(size) if i not in ids)
    mask_token = bpe.id_to_token(mask_id)

    def decode(ids: np.ndarray, mask_char: str) -> str:
        with _said_by_library():
            return bpe.decode(ids.tolist(), skip_special_tokens=False).replace(mask_token, mask_char)

    def encode(text: str) -> np.ndarray:
        with _said_by_library():
            return np.array(bpe.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    marks = frozenset({mask_id, eos_id} | {i for i, t in bpe.get_added_tokens_decoder().items() if t.special})
    vocabulary = Vocabulary(size, mask_id, gaps)
    return Tokenizer("hf", vocabulary, eos_id, files, encode, decode, special_ids=chat, control_ids=marks)


def complete_hf(files: Mapping[str, bytes]) -> tuple[Any, dict[str, int], int, int]:
    """The library's tokenizer with all that was added to it; its special tokens, separator and mask."""
    tokenizers = import_optional("tokenizers", HF_FILE)
    with _said_by_library():
        bpe = tokenizers.Tokenizer.from_str(files[HF_FILE].decode())
    bpe.no_truncation()
    bpe.no_padding()
    with _said_by_library():
        chat = {name: _special_id(bpe, tokenizers, (name,)) for name in _special_names(files)}
        eos_id, mask_id = (_special_id(bpe, tokenizers, names) for names in (EOS_TOKENS, MASK_TOKENS))
    return bpe, chat, eos_id, mask_id


@contextmanager
def _said_by_library() -> Iterator[None]:
    """What `tokenizers` raises as UsageError: bare Exception, and for a panic of its Rust code not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise UsageError(f"{HF_FILE} is not a tokenizer that the `tokenizers` library can use: {error}") from error


def _special_id(bpe: Any, tokenizers: Any, names: tuple[str, ...]) -> int:
    special = {t.content for t in bpe.get_added_tokens_decoder().values() if t.special}
    name = next((n for n in names if n in special), names[0])
    if name not in special:
        bpe.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
    return bpe.token_to_id(name)


# kind -> (its maker, the files that it needs)
KINDS: dict[str, tuple[Callable[[Mapping[str, bytes]], Tokenizer], tuple[str, ...]]] = {
    "byte": (_byte, ()),
    "char": (_char, (CHAR_FILE,)),
    "gpt2": (_gpt2, (GPT2_FILE,)),
    "hf": (_hf, (HF_FILE,)),
}
