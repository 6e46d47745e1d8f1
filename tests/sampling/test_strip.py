"""Pictures of the denoising: frames, wrapping, terminal, HTML and PNG."""

import io

import torch

from dlm_scale.sampling import stream
from dlm_scale.sampling.strip import (
    FIXED, FRESH, MASKED, OLDER, REVISED, Frame, Screen, frame_of, pick, printable, render_strip, save_strip_html,
    save_strip_png, wrap,
)  # fmt: skip

FRAME = Frame(3, 2, ((FIXED, "ab"), (FRESH, "c\nde"), (MASKED, "__"), (OLDER, "f")))


def frames_of_a_run():
    def predict(x_BL, rows_N):
        return torch.tensor([0.5, 0.5, 0.0]).log().expand(len(rows_N), -1)

    states = stream(
        predict, torch.zeros(1, 6, dtype=torch.long), torch.tensor([[True, True] + [False] * 4]), sampler="random",
        num_steps=4, seed=1, request_hashes=[1], sample_indices=[0], mask_id=2,
    )  # fmt: skip
    return [frame_of(state, 0, lambda ids: "".join("xy"[i] for i in ids), "?") for state in states]


def test_frames_show_every_position_once_with_its_status():
    frames = frames_of_a_run()
    assert frames[0].spans == ((FIXED, "xx"), (MASKED, "????"))
    assert [(frame.step, frame.num_masked) for frame in frames] == [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)]
    for number, frame in enumerate(frames):
        lengths = {status: 0 for status in (FIXED, FRESH, OLDER, MASKED)}
        for status, text in frame.spans:
            lengths[status] += len(text)
        assert lengths == {FIXED: 2, FRESH: min(number, 1), OLDER: max(number - 1, 0), MASKED: 4 - number}


def test_tokens_that_were_masked_again_are_shown_as_revised():
    def predict(x_BL, rows_N):
        return torch.tensor([0.5, 0.5, 0.0]).log().expand(len(rows_N), -1)

    x_BL, was_revealed_L, revised_L = torch.zeros(1, 12, dtype=torch.long), torch.zeros(12) > 0, torch.zeros(12) > 0
    for state in stream(
        predict, x_BL, torch.arange(12)[None] < 2, sampler="remdm_conf", num_steps=40, seed=1, request_hashes=[1],
        sample_indices=[0], mask_id=2,
    ):  # fmt: skip
        is_masked_L = state.is_masked_BL[0]
        revised_L |= was_revealed_L & is_masked_L
        was_revealed_L |= ~is_masked_L & ~state.is_fixed_BL[0]
        spans = frame_of(state, 0, lambda ids: "".join("xy"[i] for i in ids), "?").spans
        shown = [status for status, text in spans for _ in text]
        assert [status == REVISED for status in shown] == (revised_L & ~is_masked_L).tolist()
        assert [status == MASKED for status in shown] == is_masked_L.tolist()
    assert revised_L.sum() > 3


def test_wrapping_keeps_the_text_and_its_colours():
    assert wrap(FRAME, 80) == [[(FIXED, "ab"), (FRESH, "c")], [(FRESH, "de"), (MASKED, "__"), (OLDER, "f")]]
    assert wrap(FRAME, 2) == [
        [(FIXED, "ab")], [(FRESH, "c")], [(FRESH, "de")], [(MASKED, "__")], [(OLDER, "f")]
    ]  # fmt: skip
    assert wrap(Frame(0, 0, ()), 5) == [[]]


def test_no_control_character_reaches_a_terminal():
    text = printable("a\tb\x1b[31m\x00\x9bc\n\x7f\r")
    assert text == "a   b\u241b[31m\u2400\ufffdc\n\u2421\u240d"


def test_a_terminal_is_redrawn_in_place_and_a_pipe_is_not():
    out = io.StringIO()
    screen = Screen(out, is_terminal=True, delay=0.0, every=1)
    screen.show(FRAME, is_last=False)
    assert out.getvalue().startswith("--- step 3, 2 masked\n\x1b[36mab\x1b[0m\x1b[1;32mc\x1b[0m\n")
    screen.show(FRAME, is_last=True)
    assert out.getvalue().endswith("\x1b[3A\r\x1b[J")  # title and two lines are wiped
    pipe = io.StringIO()
    screen = Screen(pipe, is_terminal=False, delay=0.0, every=2)
    for _ in range(4):
        screen.show(FRAME, is_last=False)
    assert pipe.getvalue() == "--- step 3, 2 masked\nabc\nde__f\n" * 2


def test_pick_keeps_the_first_and_the_last():
    frames = [Frame(i, 0, ()) for i in range(11)]
    assert [frame.step for frame in pick(frames, 6)] == [0, 2, 4, 6, 8, 10]
    assert [frame.step for frame in pick(frames[:3], 6)] == [0, 1, 2]
    assert [frame.step for frame in pick(frames, 1)] == [10]


def test_html_holds_the_text_escaped(tmp_path):
    page = render_strip([Frame(1, 0, ((FRESH, "<b>&\x1b"),))])
    assert '<span class="fresh">&lt;b&gt;&amp;\u241b</span>' in page and "<b>" not in page
    save_strip_html(frames_of_a_run(), tmp_path / "strip.html")
    assert (tmp_path / "strip.html").read_text(encoding="utf-8").count("<tr>") == 5
    assert [path.name for path in tmp_path.iterdir()] == ["strip.html"]


def test_png_is_a_picture_with_colours(tmp_path):
    from matplotlib.image import imread

    frame = Frame(3, 2, ((FIXED, "prompt $x$"), (FRESH, "fresh\n" * 3), (MASKED, "_" * 90), (OLDER, "old")))
    save_strip_png([frame] * 7, tmp_path / "strip.png", num_frames=4)
    pixels = imread(tmp_path / "strip.png")[..., :3]
    assert pixels.shape[0] > 100 and pixels.shape[1] > 500
    for red, green, blue in ((0x1F, 0x5F, 0xA8), (0x0B, 0x8A, 0x3C), (0xB8, 0xB8, 0xB8)):
        colour = torch.tensor([red, green, blue]) / 255
        assert bool(((torch.from_numpy(pixels) - colour).abs().amax(-1) < 0.01).any())
