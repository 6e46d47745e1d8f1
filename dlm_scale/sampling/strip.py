"""Pictures of the denoising: one frame a pass, as terminal colours, an HTML table or a PNG.

A frame is text cut into spans of one status. Control characters of generated text never reach a terminal: they are
shown as their Unicode pictures.
"""

import html
import io
import itertools
import os
import shutil
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

FIXED, FRESH, REVISED, OLDER, MASKED = "fixed", "fresh", "revised", "older", "masked"
_ANSI = {
    FIXED: "\x1b[36m{}\x1b[0m", FRESH: "\x1b[1;32m{}\x1b[0m", REVISED: "\x1b[1;35m{}\x1b[0m", OLDER: "{}",
    MASKED: "\x1b[90m{}\x1b[0m",
}  # fmt: skip
_COLOURS = {FIXED: "#1f5fa8", FRESH: "#0b8a3c", REVISED: "#a3218e", OLDER: "#222222", MASKED: "#b8b8b8"}
_DPI, _FONT_POINTS, _CHARACTER_INCHES, _LINE_INCHES = 160, 9, 12 / 160, 0.16  # hinted, its glyphs are 12 pixels wide
_PICTURES = {i: 0x2400 + i for i in range(32) if i != 10} | {127: 0x2421} | {i: 0xFFFD for i in range(128, 160)}


@dataclass(frozen=True)
class Frame:
    """The text after one pass: spans of (status, text), the step it belongs to, how many positions are masked."""

    step: int
    num_masked: int
    spans: tuple[tuple[str, str], ...]


def frame_of(state, row: int, decode: Callable[..., str], mask_char: str = "_") -> Frame:
    """Frame of one row of a sampling State; `decode(ids)` is applied to each run of positions of one status."""
    ids, statuses = state.x_BL[row].tolist(), _statuses(state, row)
    runs = itertools.groupby(zip(statuses, ids), key=lambda pair: pair[0])
    runs = [(status, [token for _, token in run]) for status, run in runs]
    spans = tuple((status, mask_char * len(run) if status == MASKED else decode(run)) for status, run in runs)
    return Frame(int(state.step_B[row]), statuses.count(MASKED), spans)


def _statuses(state, row: int) -> list[str]:
    """OLDER, but where a later flag holds; REVISED: has been masked again since it was first revealed."""
    statuses = [OLDER] * state.x_BL.shape[1]
    flags = ((FRESH, state.is_fresh_BL), (REVISED, state.is_revised_BL), (FIXED, state.is_fixed_BL),
             (MASKED, state.is_masked_BL))  # fmt: skip
    for status, flag_BL in flags:
        for position in flag_BL[row].nonzero().flatten().tolist():
            statuses[position] = status
    return statuses


def printable(text: str) -> str:
    """Text that is safe in a terminal: tabs as spaces, control characters but newline as pictures."""
    return text.expandtabs(4).translate(_PICTURES)


def wrap(frame: Frame, width: int) -> list[list[tuple[str, str]]]:
    """The frame as lines of at most `width` characters, each a list of (status, text)."""
    lines, column = [[]], 0
    for status, text in frame.spans:
        for number, piece in enumerate(printable(text).split("\n")):
            if number > 0:
                lines.append([])
                column = 0
            while piece:
                if column == width:
                    lines.append([])
                    column = 0
                part, piece = piece[: width - column], piece[width - column :]
                lines[-1].append((status, part))
                column += len(part)
    return lines


def ansi_lines(frame: Frame, width: int) -> list[str]:
    """The lines of `wrap` with terminal colours."""
    return ["".join(_ANSI[status].format(text) for status, text in line) for line in wrap(frame, width)]


def pick(frames: Sequence[Frame], count: int) -> list[Frame]:
    """At most `count` frames, evenly spread, the first and the last among them."""
    if len(frames) <= count or count < 2:
        return list(frames[-count:])
    return [frames[round(i * (len(frames) - 1) / (count - 1))] for i in range(count)]


def render_strip(frames: Sequence[Frame]) -> str:
    """A self-contained HTML page: a table with a row a frame, in the colours of the terminal."""
    styles = "".join(f".{status}{{color:{colour}}}" for status, colour in _COLOURS.items())
    rows = "".join(f"<tr><th>{frame.step}</th><td><pre>{_html_spans(frame)}</pre></td></tr>\n" for frame in frames)
    legend = " ".join(f'<span class="{status}">{status}</span>' for status in _COLOURS)
    return (
        '<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>Denoising</title><style>'
        f"th{{vertical-align:top;text-align:right;padding:.6em}}pre{{white-space:pre-wrap}}{styles}</style></head>\n"
        f"<body><p>{legend}</p>\n<table>\n{rows}</table></body></html>\n"
    )


def _html_spans(frame: Frame) -> str:
    return "".join(f'<span class="{status}">{html.escape(printable(text))}</span>' for status, text in frame.spans)


def save_strip_html(frames: Sequence[Frame], path: "str | Path") -> None:
    """Write `render_strip(frames)`; raises OSError."""
    _write(path, render_strip(frames).encode())


def save_strip_png(
    frames: Sequence[Frame], path: "str | Path", *, num_frames: int = 6, width: int = 64, columns: int = 2
) -> None:
    """Draw about six frames as coloured text, in rows of `columns` panels; needs matplotlib. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(f"step {f.step}: {f.num_masked} masked", wrap(f, width)) for f in pick(frames, num_frames)]
    panel_rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(len(lines) for _, lines in row) + 2.5 for row in panel_rows]
    total_width, total_height = columns * (width + 3) + 1, sum(heights) + 0.5
    figure = Figure(figsize=(total_width * _CHARACTER_INCHES, total_height * _LINE_INCHES))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))  # one unit is one character cell
    axes.set(xlim=(0, total_width), ylim=(total_height, 0))
    axes.axis("off")
    top = 0.5
    for row, height in zip(panel_rows, heights):
        for number, (title, lines) in enumerate(row):
            _draw_panel(axes, number * (width + 3) + 1, top, [[("title", title)], *lines])
        top += height
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    _write(path, buffer.getvalue())


def _draw_panel(axes, left: float, top: float, lines: list[list[tuple[str, str]]]) -> None:
    style = {"family": "monospace", "fontsize": _FONT_POINTS, "va": "top", "parse_math": False}
    for row, line in enumerate(lines):
        column = left
        for status, text in line:
            weight = "bold" if status == "title" else "normal"
            axes.text(column, top + row, text, color=_COLOURS.get(status, "black"), weight=weight, **style)
            column += len(text)


class Screen:
    """Frames drawn one over the other in a terminal, or one below the other in a pipe; every `every`-th.

    out: a text stream, delay: seconds a frame. The last frame is only wiped away: the caller prints the whole text.
    """

    def __init__(self, out: TextIO, is_terminal: bool, delay: float, every: int):
        self.out, self.is_terminal, self.delay, self.every = out, is_terminal, delay, every
        self.num_seen = self.num_lines = 0

    def show(self, frame: Frame, is_last: bool) -> None:
        self.num_seen += 1
        if (self.num_seen - 1) % self.every and not is_last:
            return
        lines = [] if is_last else self._lines(frame)
        if self.is_terminal and self.num_lines:
            self.out.write(f"\x1b[{self.num_lines}A\r\x1b[J")
        self.out.write("".join(f"{line}\n" for line in lines))
        self.out.flush()
        self.num_lines = len(lines)
        time.sleep(self.delay)

    def _lines(self, frame: Frame) -> list[str]:
        title = f"--- step {frame.step}, {frame.num_masked} masked"
        if not self.is_terminal:
            return [title, printable("".join(text for _, text in frame.spans))]
        columns, rows = shutil.get_terminal_size()
        return [title, *ansi_lines(frame, _columns(frame, columns))[-(rows - 2) :]]


def _columns(frame: Frame, columns: int) -> int:
    """Characters a line: half as many where some take two columns."""
    is_wide = any(unicodedata.east_asian_width(char) in "WF" for _, text in frame.spans for char in text)
    return max(1, columns // 2 if is_wide else columns)


def _write(path: "str | Path", content: bytes) -> None:
    beside = Path(f"{path}.{os.getpid()}.tmp")
    beside.write_bytes(content)
    os.replace(beside, path)
