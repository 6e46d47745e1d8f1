"""The input of offline batch sampling: JSON Lines of requests, read by offset, never held as a whole.

A line is an object with `id` (text or whole number) and one of
    "prompt": text to continue          "text": text with holes <mask>, <mask:12>
    "tokens": ids; open where the mask id stands, and without one a prompt
    "messages": a conversation whose next answer is wanted (with a chat template, which makes a prompt a question too)
and, for all but holes, "max_new_tokens". Everything else is refused, with the number of the line.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from dlm_scale.errors import UsageError
from dlm_scale.sampling.requests import (
    Canvas,
    chat_canvas,
    infill_canvas,
    open_canvas,
    prompt_canvas,
    require_prompt,
)

MAX_LINE_BYTES = 16 << 20
KINDS = ("prompt", "text", "tokens", "messages")
KEYS = ("id", *KINDS, "max_new_tokens")
ENTRY = np.dtype([("line", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("length", "<i4"), ("num_open", "<i4"),
                  ("id_low", "<u8"), ("id_high", "<u8")])  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """How a line becomes a canvas: a strict JSON parser, the tokenizer (or None), its vocabulary, the limits, and what
    makes ids of conversations (dlm_scale.inference.Conversations), or None."""

    parse_json: Callable[[bytes, str], Any]
    tokenizer: Any
    vocabulary: Any
    seq_len: int
    max_new_tokens: "int | None"
    is_left_to_right: bool = False  # then nothing may stand behind an open position
    chat: Any = None

    def request(self, line: bytes) -> tuple["str | int", Canvas]:
        """(id, canvas) of a line. Raises UsageError or ValueError saying what is wrong with it."""
        value = self.parse_json(line, "the line")
        if not isinstance(value, dict):
            raise UsageError("not a JSON object")
        _check_keys(value)
        request_id = value.get("id")
        if type(request_id) not in (str, int) or request_id == "":
            raise UsageError("no id: give each line its own, a text or a whole number")
        str(request_id).encode()  # half a surrogate pair is no text
        canvas = self._canvas(value)
        return request_id, require_prompt(canvas) if self.is_left_to_right else canvas

    def _canvas(self, value: dict[str, Any]) -> Canvas:
        mask_id, seq_len = self.vocabulary.mask_id, self.seq_len
        new_tokens = value.get("max_new_tokens", self.max_new_tokens)
        if new_tokens is not None and (type(new_tokens) is not int or new_tokens < 1):
            raise UsageError(f"max_new_tokens is {str(new_tokens)[:40]!r}, not a whole number from 1 on")
        if "tokens" in value:
            ids = self._checked_ids(value["tokens"])
            if mask_id not in ids:
                return prompt_canvas(ids, new_tokens, mask_id, seq_len)
        elif "messages" in value or "prompt" in value and self.chat is not None:
            return chat_canvas(self._conversation(value), new_tokens, mask_id, seq_len)
        elif "prompt" in value:
            return prompt_canvas(self._tokenizer_for("prompt", value).encode(value["prompt"]), new_tokens, mask_id, seq_len)
        if "max_new_tokens" in value:
            raise UsageError("max_new_tokens goes with a prompt; holes have the lengths that they have")
        if "tokens" in value:
            return open_canvas(ids, mask_id, seq_len)
        return infill_canvas(value["text"], self._tokenizer_for("text", value), seq_len)

    def _tokenizer_for(self, kind: str, value: dict[str, Any]) -> Any:
        """The tokenizer, for a text under this key. Raises UsageError where either is missing."""
        if not isinstance(value[kind], str):
            raise UsageError(f"{kind} is not a text")
        if self.tokenizer is None:
            raise UsageError(f"this checkpoint has no tokenizer to read {kind} with: give tokens")
        return self.tokenizer

    def _conversation(self, value: dict[str, Any]) -> Any:
        if "prompt" in value:
            self._tokenizer_for("prompt", value)
            return self.chat.asked(value["prompt"])
        if self.chat is None:
            raise UsageError("messages need a chat template: say --chat")
        if not isinstance(value["messages"], list):
            raise UsageError("messages is not a list of objects with role and content")
        return self.chat.next_answer(value["messages"])

    def _checked_ids(self, ids: Any) -> list[int]:
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise UsageError("tokens is not a list of whole numbers")
        forbidden = set(self.vocabulary.suppressed_ids)
        bad = next((token for token in ids if not 0 <= token < self.vocabulary.size or token in forbidden), None)
        if bad is not None:
            raise UsageError(f"token {str(bad)[:40]} is not one of the {self.vocabulary.size} of this vocabulary")
        return ids


def _check_keys(value: dict[str, Any]) -> None:
    for key in value:
        if key not in KEYS:
            near = difflib.get_close_matches(key[:40], KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KEYS)}"
            raise UsageError(f"key {key[:40]!r} is unknown; {hint}")
    kinds = [kind for kind in KINDS if kind in value]
    if len(kinds) != 1:
        raise UsageError(f"needs one of {', '.join(KINDS)}, has {' and '.join(kinds) or 'none'}")


def lines_of(file: IO[bytes]) -> Iterator[tuple[int, int, "bytes | None"]]:
    """(number from 1, offset, content) of each line that is not blank; None for one beyond MAX_LINE_BYTES."""
    number, offset = 0, 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number, start, size = number + 1, offset, len(line)
        is_long = size > MAX_LINE_BYTES
        while is_long and not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
            size += len(line)
        offset += size
        if is_long or line.strip():
            yield number, start, None if is_long else line


def scan(file: IO[bytes], reader: Reader, report: Callable[[int, str], None]) -> np.ndarray:
    """ENTRY [requests] of all good lines, in order; `report(line number, id, reason)` hears of the others."""
    entries = bytearray()
    for number, offset, line in lines_of(file):
        try:
            if line is None:
                raise UsageError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
            request_id, canvas = reader.request(line)
        except (UsageError, ValueError, RecursionError) as error:
            report(number, str(error).splitlines()[0][:500])
        else:
            low, high = id_words(request_id)
            row = (number, offset, len(line), len(canvas.ids), canvas.num_open, low, high)
            entries += np.array(row, dtype=ENTRY).tobytes()
    index = np.frombuffer(entries, dtype=ENTRY)
    return _without_repeats(index, report)


def _without_repeats(index: np.ndarray, report: Callable) -> np.ndarray:
    """The first line of each id."""
    _, first = np.unique(index[["id_low", "id_high"]], return_index=True)
    is_first = np.zeros(len(index), dtype=bool)
    is_first[first] = True
    if not is_first.all():
        line_of = dict(zip(map(tuple, index[["id_low", "id_high"]][first].tolist()), index["line"][first].tolist()))
        for entry in index[~is_first]:
            report(int(entry["line"]), f"its id stands in line {line_of[entry['id_low'], entry['id_high']]} already")
    return index[is_first]


def read_request(file: IO[bytes], entry: np.void, reader: Reader) -> tuple["str | int", Canvas]:
    """The request of an entry of the index."""
    file.seek(int(entry["offset"]))
    return reader.request(file.read(int(entry["size"])))


def id_words(request_id: "str | int") -> tuple[int, int]:
    """128 bits of an id; 1 and "1" are the same id. Ids with the same words count as equal."""
    digest = hashlib.blake2b(str(request_id).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def noise_address(request_id: "str | int", sample: int) -> tuple[int, int]:
    """The two counter words (request hash, sample) of a sample's random numbers: 64 bits of a hash of both.

    The hash alone in 32 bits would give two of 10,000 ids the same random numbers with a chance of 1 %, two of
    100,000 with 69 %; here it is 3e-10 for 100,000 samples.
    """
    digest = hashlib.blake2b(f"{sample}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
