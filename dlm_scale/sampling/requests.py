"""What to fill, and what came of it: canvases from prompts, infill texts and token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dlm_scale.errors import UsageError

DEFAULT_NEW_TOKENS = 256
LONGEST_IN_BLOCKS = 1 << 20
_MASK_SPAN = re.compile(r"<mask(?::(\d{1,9}))?>")


@dataclass(frozen=True)
class Canvas:
    """ids [L] with the mask id at the open positions; all others stay as they are. The text begins at `shown_from`."""

    ids: list[int]
    is_fixed: list[bool]
    shown_from: int = 0

    @property
    def num_open(self) -> int:
        return self.is_fixed.count(False)


@dataclass(frozen=True)
class Sample:
    """One result: ids up to and with the stop id, the text before it (None without a tokenizer), its passes."""

    index: int
    ids: list[int]
    text: "str | None"
    nfe: int


def prompt_canvas(ids: Sequence[int], max_new_tokens: "int | None", mask_id: int, seq_len: int) -> Canvas:
    """The prompt, then `max_new_tokens` masks (256, or what the context leaves). Raises UsageError if too long."""
    new_tokens = max_new_tokens or min(DEFAULT_NEW_TOKENS, max(1, seq_len - len(ids)))
    parts = f"prompt ({len(ids)} tokens) + max_new_tokens ({new_tokens})"
    if len(ids) + new_tokens > seq_len:  # before a list of that length is made
        raise too_long(parts, len(ids) + new_tokens, seq_len)
    return Canvas([*map(int, ids), *[mask_id] * new_tokens], [True] * len(ids) + [False] * new_tokens)


def chat_canvas(ids: Sequence[int], max_new_tokens: "int | None", mask_id: int, seq_len: int) -> Canvas:
    """The same for a conversation up to where its next answer begins; the text is that answer alone."""
    return replace(prompt_canvas(ids, max_new_tokens, mask_id, seq_len), shown_from=len(ids))


def infill_canvas(text: str, tokenizer: Any, seq_len: int) -> Canvas:
    """A text whose <mask> (one token) and <mask:12> (twelve) are open. Raises UsageError: no hole, or too long."""
    mask_id = tokenizer.vocabulary.mask_id
    pieces = _MASK_SPAN.split(text)
    if len(pieces) == 1:
        raise UsageError("the text needs a hole: <mask> for one token, <mask:12> for twelve")
    counts = [int(count or 1) for count in pieces[1::2]]
    fixed = [[int(token) for token in tokenizer.encode(piece)] for piece in pieces[::2]]
    length = sum(map(len, fixed)) + sum(counts)
    if length > seq_len:
        raise too_long("the text with its holes", length, seq_len)
    ids = list(fixed[0])
    for count, piece in zip(counts, fixed[1:]):
        ids += [mask_id] * count + piece
    return open_canvas(ids, mask_id, seq_len)


def open_canvas(ids: Sequence[int], mask_id: int, seq_len: int) -> Canvas:
    """Ids as they are, open where the mask stands. Raises UsageError if too long."""
    if len(ids) > seq_len:
        raise too_long("the row", len(ids), seq_len)
    return Canvas(list(ids), [token != mask_id for token in ids])


def require_prompt(canvas: Canvas) -> Canvas:
    """The canvas, whose open positions come last. Raises UsageError where text stands behind one."""
    if canvas.is_fixed != sorted(canvas.is_fixed, reverse=True):
        raise UsageError("text stands behind a hole, and this checkpoint is autoregressive: it sees what comes before "
                         "alone; give a prompt, or take a masked checkpoint")
    return canvas


def too_long(what: str, length: int, seq_len: int) -> UsageError:
    return UsageError(
        f"{what} = {length} tokens, but the limit (the checkpoint's seq_len; with --block_size {LONGEST_IN_BLOCKS}) "
        f"is {seq_len}: shorten by {length - seq_len}"
    )


def finished(
    index: int, ids: list[int], nfe: int, canvas: Canvas, stop_ids: Sequence[int], tokenizer: Any
) -> Sample:
    """Cut a row after its first generated stop id; the text leaves that id out, and what stands before `shown_from`."""
    stops = (i for i, token in enumerate(ids) if token in stop_ids and not canvas.is_fixed[i])
    stop = next(stops, len(ids))
    text = None if tokenizer is None else tokenizer.decode(ids[canvas.shown_from : stop])
    return Sample(index, ids[: stop + 1], text, nfe)
