"""Tokenizers: known ids, round trips, the mask shown, and the same tokenizer again from a folder."""

import json

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from dlm_scale.data.tokenizer import KINDS, load_tokenizer, make_tokenizer
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.errors import UsageError


def hf_file(folder, vocabulary, special):
    """A word-level tokenizer.json; `special` names are its special tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(special)
    made.enable_truncation(3)
    made.enable_padding(length=8)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


WORDS = {"[UNK]": 0, "[MASK]": 1, "[SEP]": 2, "a": 3, "dog": 4, "runs": 5, "[": 7, "]": 8, "MASK": 9}


def test_vocabulary_gives_a_last_mask_no_output_row():
    assert Vocabulary(66, 65).num_outputs == 65
    assert Vocabulary(66, 3).num_outputs == 66
    for bad in ((1, 0), (5, 5), (5, -1)):
        with pytest.raises(UsageError):
            Vocabulary(*bad)
    with pytest.raises(UsageError, match="suppressed_ids"):
        Vocabulary(5, 4, (7,))
    with pytest.raises(UsageError, match="no id"):
        Vocabulary(3, 2, (0, 1))


@pytest.mark.parametrize("dtype", ["u2", "i4", "i8"])
def test_first_invalid_agrees_with_a_loop(dtype):
    rng = np.random.default_rng(0)
    for vocabulary in (Vocabulary(9, 8), Vocabulary(9, 2), Vocabulary(9, 2, (5, 6)), Vocabulary(9, 8, (0,))):
        for low, high in ((0, 12), (0, 9), (3, 5), (-3 if dtype != "u2" else 0, 8)):
            ids = rng.integers(low, high, size=(2, 3)).astype(dtype)
            bad = {vocabulary.mask_id, *vocabulary.suppressed_ids}
            expected = [i for i, x in enumerate(ids.reshape(-1)) if not 0 <= x < 9 or x in bad]
            assert vocabulary.first_invalid(ids) == (expected[0] if expected else None)


@given(st.text())
def test_byte_round_trip(text):
    made = make_tokenizer("byte")
    ids = made.encode(text)
    assert ids.tolist() == list(text.encode())
    assert made.decode(ids) == text
    assert (made.vocabulary, made.eos_id) == (Vocabulary(257, 256), 0)


@given(st.text(min_size=1))
def test_char_round_trip(text):
    made = make_tokenizer("char", [text[:2], text])
    assert made.decode(made.encode(text)) == text
    assert made.vocabulary.size == len(set(text)) + 1
    assert made.vocabulary.mask_id == len(set(text)) and made.eos_id is None


def test_char_names_the_unknown_character():
    with pytest.raises(UsageError, match="'z'"):
        make_tokenizer("char", ["hello"]).encode("hez")
    with pytest.raises(UsageError, match="'\U0001f600'"):
        make_tokenizer("char", ["hello"]).encode("\U0001f600")
    with pytest.raises(UsageError, match="no text"):
        make_tokenizer("char", [])


@pytest.mark.parametrize("raw", [b'["a", "b"]', b'"ba"', b'"aa"'])
def test_a_characters_file_that_was_not_made_here(raw):
    with pytest.raises(UsageError, match="characters.json"):
        KINDS["char"][0]({"characters.json": raw})


def test_char_of_tinyshakespeare_is_the_known_one(shared_data):
    made = make_tokenizer("char", [shared_data("tinyshakespeare.txt").read_text()])
    assert made.vocabulary == Vocabulary(66, 65)
    assert made.encode("hii there").tolist() == [46, 47, 47, 1, 58, 46, 43, 56, 43]


def test_masks_are_shown_and_runs_decoded_apart():
    made = make_tokenizer("byte")
    ids = np.concatenate([[256], made.encode("aé"), [256, 256], made.encode("b"), [256]])
    assert made.decode(ids) == "_aé__b_"
    assert made.decode(ids, mask_char="▒") == "▒aé▒▒b▒"
    assert made.decode([0xC3, 256, 0xA9]) == "\ufffd_\ufffd"  # a character with a masked byte inside
    assert made.decode([]) == ""


def test_gpt2_known_ids(shared_data):
    made = make_tokenizer(str(shared_data("gpt2.tiktoken")))
    assert made.encode("hello world").tolist() == [31373, 995]
    known = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert made.encode("Hello, I'm a language model,").tolist() == known
    assert made.decode(known[:2] + [50257] + known[2:3]) == "Hello,_ I"
    assert (made.vocabulary, made.eos_id) == (Vocabulary(50258, 50257), 50256)
    text = "x <|endoftext|>"
    assert 50256 not in made.encode(text) and made.decode(made.encode(text)) == text
    assert made.decode([50256]) == "<|endoftext|>"


@pytest.mark.parametrize(("name", "tokens"), [("tinyshakespeare.txt", 338_025), ("wikitext2_valid.txt", 258_659)])
def test_gpt2_token_counts_of_known_texts(shared_data, name, tokens):
    made = make_tokenizer(str(shared_data("gpt2.tiktoken")))
    text = shared_data(name).read_text()
    ids = made.encode(text)
    assert len(ids) == tokens
    assert made.decode(ids) == text


def test_gpt2_by_name_uses_tiktokens_copy_or_says_what_to_do(shared_data, monkeypatch):
    local = make_tokenizer(str(shared_data("gpt2.tiktoken")))
    ranks = load_tiktoken_bpe(str(shared_data("gpt2.tiktoken")))
    cached = tiktoken.Encoding("r50k_base", pat_str="x", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"r50k_base": cached}[name])
    assert make_tokenizer("gpt2").hash == local.hash

    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UsageError, match="local file"):
        make_tokenizer("gpt2")


def test_another_ranks_file_is_refused(tmp_path):
    (tmp_path / "mine.tiktoken").write_bytes(b"YQ== 0\n")
    with pytest.raises(UsageError, match="is not GPT-2's"):
        make_tokenizer(str(tmp_path / "mine.tiktoken"))


def test_hf_with_its_own_mask_in_the_middle(tmp_path):
    made = make_tokenizer(str(hf_file(tmp_path, WORDS, ["[UNK]", "[MASK]", "[SEP]"])))
    assert made.vocabulary == Vocabulary(10, 1, (6,))  # id 6 is a gap
    assert made.eos_id == 2
    assert made.encode("a dog runs a dog runs").tolist() == [3, 4, 5, 3, 4, 5]  # neither cut nor padded
    assert made.encode("a [MASK] runs").tolist() == [3, 7, 9, 8, 5]  # text is text
    assert made.decode([3, 1, 5]) == "a _ runs"


def test_hf_without_mask_or_separator_gets_them_last(tmp_path):
    words = {"[UNK]": 0, "a": 1, "dog": 2}
    path = hf_file(tmp_path, words, ["[UNK]"])
    made = make_tokenizer(str(path))
    assert made.vocabulary == Vocabulary(5, 4) and made.eos_id == 3
    assert made.decode([1, 4, 2]) == "a _ dog"
    assert make_tokenizer(str(tmp_path)).hash == made.hash  # its folder names it too


def test_hf_refusals(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a tokenizer"):
        make_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(UsageError, match="No such file"):
        make_tokenizer(str(tmp_path / "absent.json"))
    path = hf_file(tmp_path, {"[UNK]": 0, "a": 1, "dog": 3}, [])  # the library would give id 3 twice
    with pytest.raises(UsageError, match="share an id"):
        make_tokenizer(str(path))


def test_unknown_tokenizer():
    with pytest.raises(UsageError, match="Did you mean 'byte'"):
        make_tokenizer("bytes")
    with pytest.raises(UsageError, match="tokenizer.json"):
        make_tokenizer("sentencepiece")


@pytest.mark.parametrize("kind", ["byte", "char", "gpt2", "hf"])
def test_a_copied_folder_gives_the_same_tokenizer(kind, tmp_path, request):
    spec = kind
    if kind == "gpt2":
        spec = str(request.getfixturevalue("shared_data")("gpt2.tiktoken"))
    if kind == "hf":
        spec = str(hf_file(tmp_path, WORDS, ["[UNK]", "[MASK]", "[SEP]"]))
    made = make_tokenizer(spec, ["a dog runs"])
    dst = tmp_path / "dst"
    dst.mkdir()
    block = json.loads(json.dumps(made.meta.tokenizer_dict()))
    assert sorted(made.save(dst)) == sorted(p.name for p in dst.iterdir())
    again = load_tokenizer(dst, block | {"other": 1})
    assert again.meta == made.meta and again.hash == made.hash
    assert again.encode("a dog").tolist() == made.encode("a dog").tolist()
    for path in dst.iterdir():
        path.write_bytes(path.read_bytes().replace(b"d", b"q"))
        with pytest.raises(UsageError):
            load_tokenizer(dst, block)
        path.unlink()
        with pytest.raises(UsageError, match="No such file"):
            load_tokenizer(dst, block)


def test_loading_refuses_other_numbers_and_no_tokenizer(tmp_path):
    block = make_tokenizer("byte").meta.tokenizer_dict()
    with pytest.raises(UsageError, match="not the one"):
        load_tokenizer(tmp_path, block | {"mask_id": 255})
    with pytest.raises(UsageError, match="not the one"):
        load_tokenizer(tmp_path, block | {"tokenizer": block["tokenizer"] | {"files": ["x"]}})
    with pytest.raises(UsageError, match="vocab_size"):
        load_tokenizer(tmp_path, {k: v for k, v in block.items() if k != "vocab_size"})
    none = block | {"tokenizer": {"kind": "none", "files": [], "hash": ""}}
    with pytest.raises(UsageError, match="synthetic"):
        load_tokenizer(tmp_path, none)


CHAT = ("<|im_start|>", "<|im_end|>", "<|delete|>")


@pytest.mark.parametrize("kind", ["byte", "char", "gpt2", "hf"])
def test_special_tokens_stand_behind_text_and_no_text_becomes_one(kind, tmp_path, request):
    spec = kind
    if kind == "gpt2":
        spec = str(request.getfixturevalue("shared_data")("gpt2.tiktoken"))
    if kind == "hf":
        spec = str(hf_file(tmp_path, {"[UNK]": 0, "a": 1, "dog": 2}, ["[UNK]"]))
    text = "a dog" + "".join(sorted(set("".join(CHAT))))
    plain, made = make_tokenizer(spec, [text]), make_tokenizer(spec, [text], CHAT)
    assert tuple(made.special_ids) == CHAT and not plain.special_ids and plain.hash != made.hash
    assert made.vocabulary.size == plain.vocabulary.size + 3 and made.vocabulary.mask_id == made.vocabulary.size - 1
    assert np.array_equal(made.encode("a dog"), plain.encode("a dog")) and made.eos_id == plain.eos_id or kind == "hf"
    start, end, _ = made.special_ids.values()
    if kind != "hf":
        assert not set(made.encode("".join(CHAT)).tolist()) & set(made.special_ids.values())
    ids = [start, *made.encode("a"), made.vocabulary.mask_id, end]
    assert made.decode(ids).replace(" ", "") == "<|im_start|>a_<|im_end|>"
    made.save(tmp_path)
    again = load_tokenizer(tmp_path, made.meta)
    assert again.hash == made.hash and again.special_ids == made.special_ids
    (tmp_path / "special_tokens.json").write_text(json.dumps([*CHAT[:2], "<|other|>"]))
    with pytest.raises(UsageError, match="not the one that its meta describes"):
        load_tokenizer(tmp_path, made.meta)


def test_special_tokens_of_a_tokenizer_file_keep_their_ids(tmp_path):
    words = {"[UNK]": 0, "[MASK]": 1, "[SEP]": 2, "a": 3}
    spec = str(hf_file(tmp_path, words, ["[UNK]", "[MASK]", "[SEP]"]))
    made = make_tokenizer(spec, special_tokens=["[SEP]", "<|im_end|>"])
    assert made.special_ids == {"[SEP]": 2, "<|im_end|>": 4} and made.vocabulary.mask_id == 1


@pytest.mark.parametrize("names", [["a"], ["<a b>"], ["<x>", "<x>"], [""], ["<" + "x" * 99 + ">"], ["<x>"] * 999])
def test_names_that_are_no_special_tokens(names):
    with pytest.raises(UsageError, match="special tokens"):
        make_tokenizer("byte", special_tokens=names)
