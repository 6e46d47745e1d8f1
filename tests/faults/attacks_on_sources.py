"""Hostile texts to prepare, and hostile tokenizers: bombs, pipes, rows that are no rows, patterns that never end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.faults.hostile import Attack, Scene, pickle_of, source_file, text, torch_file

WORDS = {"[UNK]": 0, "a": 1, "b": 2, "the": 3}


def source_attacks() -> list[Attack]:
    deep = '{"text": ' + "[" * 100_000 + "\n"
    rows = {"deep JSON": deep, "a huge number": '{"text": ' + "9" * 6000 + "}\n", "no object": '["text"]\n',
            "code": '{"text": {"__reduce__": "os.system"}}\n', "half a line": '{"text": "a', "nul bytes": "\0\0\n"}
    found = [Attack(f"{name} in a .jsonl", source_file("rows.jsonl", text(body)), "source", True)
             for name, body in rows.items()]
    found += [
        Attack("a pickle as .jsonl", source_file("rows.jsonl", pickle_of), "source", True),
        Attack("a pickle as .parquet", source_file("rows.parquet", pickle_of), "source", True),
        Attack("a torch file as .jsonl.zst", source_file("rows.jsonl.zst", torch_file), "source", True),
        Attack("a pickled type in Parquet", source_file("rows.parquet", _parquet_with_pickle), "source"),
        Attack("a Zstandard bomb", source_file("rows.jsonl.zst", _zst_bomb), "source", True),
        Attack("a Parquet bomb", source_file("rows.parquet", _parquet_bomb), "source"),
        Attack("a text of 4 TB", _sparse, "source", True),
        Attack("only a pipe", _only_a_pipe, "source", True),
        Attack("links in a circle", _circle, "source", True),
        Attack("a link to /dev/zero", lambda s: _link(s, "a.txt", Path("/dev/zero")), "source", True),
        Attack("Python as a text", source_file("a.txt", text("PYTHON\n" * 50)), "source"),
        Attack("terminal escapes in a text", source_file("a.txt", text("\x1b]0;x\x07 \x1b[2J" * 50)), "source"),
    ]
    return found


def _parquet_with_pickle(scene: Scene) -> bytes:
    """A column of the extension type that old readers unpickled (CVE-2023-47248)."""
    import pyarrow
    from pyarrow import parquet

    field = pyarrow.field("text", pyarrow.string(), metadata={
        b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle_of(scene)})
    rows = pyarrow.table([pyarrow.array(["some text", "more text"])], schema=pyarrow.schema([field]))
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(rows, sink)
    return sink.getvalue().to_pybytes()


def _parquet_bomb(scene: Scene) -> bytes:
    """A hundred MB of rows in a few kilobytes."""
    import pyarrow
    from pyarrow import parquet

    values = pyarrow.DictionaryArray.from_arrays(pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), 100_000),
                                                 pyarrow.array(["x" * 1000]))
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": values}), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _zst_bomb(scene: Scene) -> bytes:
    """One line of 3 GB in some hundred kilobytes."""
    import zstandard

    maker = zstandard.ZstdCompressor(level=19).compressobj()
    parts = [maker.compress(b'{"text": "')]
    parts += [maker.compress(b"a" * (1 << 24)) for _ in range(180)]
    return b"".join([*parts, maker.flush()])


def _folder(scene: Scene) -> Path:
    folder = scene.data.parent / "source"
    folder.mkdir(exist_ok=True)
    return folder


def _sparse(scene: Scene) -> None:
    with open(_folder(scene) / "a.txt", "wb") as file:
        file.truncate(1 << 42)


def _only_a_pipe(scene: Scene) -> None:
    os.mkfifo(_folder(scene) / "a.txt")


def _circle(scene: Scene) -> None:
    (_folder(scene) / "again").symlink_to(".")
    (_folder(scene) / "a.txt").symlink_to("b.txt")
    (_folder(scene) / "b.txt").symlink_to("a.txt")


def _link(scene: Scene, name: str, target: Path) -> None:
    (_folder(scene) / name).symlink_to(target)


def _tokenizer(**parts: object) -> str:
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
             "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
             "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"}}
    return json.dumps(whole | parts)


def _word_level(**vocab: int) -> dict:
    return {"type": "WordLevel", "vocab": WORDS | vocab, "unk_token": "[UNK]"}


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _replace(pattern: object, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def tokenizer_attacks() -> list[Attack]:
    """As `--tokenizer` of prepare, where also the text that meets the pattern comes from the attacker."""
    def added(number: int) -> list[dict]:
        return [{"id": number, "content": "[X]", "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}]

    bodies = {
        "a regex that backtracks": _tokenizer(pre_tokenizer=_split(r"(a+)+$")),
        "a regex of nested repeats": _tokenizer(pre_tokenizer=_split("((((a{1,99}){1,99}){1,99}){1,99})b")),
        "a regex that is none": _tokenizer(pre_tokenizer=_split("(((")),
        "a replacement that grows": _tokenizer(normalizer={"type": "Sequence", "normalizers": [
            _replace({"String": "a"}, "aaaaaaaaaa")] * 3}),
        "a token of id 2^32 - 1": _tokenizer(model=_word_level(x=2**32 - 1)),
        "a token of id 10^9": _tokenizer(model=_word_level(x=10**9)),
        "a token of id 2^70": _tokenizer(model=_word_level(x=2**70)),
        "a token of id -1": _tokenizer(model=_word_level(x=-1)),
        "two tokens of one id": _tokenizer(model=_word_level(x=1)),
        "an added token of id 10^9": _tokenizer(added_tokens=added(10**9)),
        "no unknown token": _tokenizer(model={"type": "WordLevel", "vocab": WORDS, "unk_token": "[NONE]"}),
        "no tokens": _tokenizer(model={"type": "WordLevel", "vocab": {}, "unk_token": ""}),
        "a model of code": _tokenizer(model={"type": "os.system", "vocab": "COMMAND"}),
        "merges of nothing": _tokenizer(model={"type": "BPE", "vocab": WORDS, "merges": ["x y", "a"]}),
        "a charsmap that is none": _tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "////"}),
        "an unknown id outside": _tokenizer(model={"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]]}),
        "no unknown id": _tokenizer(model={"type": "Unigram", "unk_id": None, "vocab": [["q", -1.0]]}),
        "endless padding": _tokenizer(padding={"strategy": {"Fixed": 10**12}, "direction": "Right",
                                               "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                                               "pad_token": "[UNK]"}),
        "a template without tokens": _tokenizer(post_processor={"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "[GONE]", "type_id": 0}}], "pair": [], "special_tokens": {}}),
        "a huge field": _tokenizer(version="x" * 5_000_000),
        "deep JSON": "[" * 100_000,
        "a number of 6000 digits": "9" * 6000,
        "nothing": "",
    }
    found = [Attack(f"tokenizer.json with {name}", _tokenizer_file("tokenizer.json", text(body)), "tokenizer")
             for name, body in bodies.items()]
    others: dict[str, tuple[str, Callable[[Scene], bytes]]] = {
        "a pickle as tokenizer.json": ("tokenizer.json", pickle_of),
        "a pickle as .tiktoken": ("x.tiktoken", pickle_of),
        "code as .tiktoken": ("x.tiktoken", text("PYTHON")),
        "ranks that are not GPT-2's": ("x.tiktoken", text("YQ== 0\nYg== 1\n")),
    }
    found += [Attack(name, _tokenizer_file(*what), "tokenizer", True) for name, what in others.items()]
    found.append(Attack("a pipe as tokenizer.json", _tokenizer_pipe, "tokenizer", True))
    return found


def _tokenizer_file(name: str, content: Callable[[Scene], bytes]) -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        source_file("a.txt", text("the b " + "a" * 40 + "! "))(scene)
        source_file("b.txt", text("a b the a b the"))(scene)
        folder = scene.data.parent / "tokenizer"
        folder.mkdir()
        (folder / name).write_bytes(content(scene))

    return plant


def _tokenizer_pipe(scene: Scene) -> None:
    _tokenizer_file("tokenizer.json", text(""))(scene)
    path = scene.data.parent / "tokenizer" / "tokenizer.json"
    path.unlink()
    os.mkfifo(path)
