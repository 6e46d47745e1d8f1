"""`dlm sample` over a made-up checkpoint: flags, prompts, infilling, output."""

import argparse
import io
import json
import subprocess
import sys
import types

import pytest
import torch

from dlm_scale import sample
from dlm_scale.data.tokenizer import make_tokenizer
from dlm_scale.errors import UsageError

TEXT = "abcdefghijklmnopqrstuvwxyz .\n"


@pytest.fixture
def dlm_sample(monkeypatch, capsys):
    """Runs `dlm sample` with a list of arguments; returns what it printed."""
    tokenizer = make_tokenizer("char", [TEXT])
    calls = []

    def predict(x_BL, rows_N, attention=None, cache=None):
        calls.append(len(x_BL))
        assert x_BL.shape[1] <= 64
        table = torch.randn(97, 30, generator=torch.Generator().manual_seed(0))
        table[:, tokenizer.vocabulary.mask_id] = -torch.inf
        code_B = x_BL.sum(1)
        return torch.log_softmax(table[(code_B[rows_N // x_BL.shape[1]] + rows_N % x_BL.shape[1]) % 97], -1)

    inference = types.SimpleNamespace(
        predict=predict, tokenizer=tokenizer, vocabulary=tokenizer.vocabulary, seq_len=64, step=7,
        device=torch.device("cpu"), default_num_steps=5, default_sampler="ancestral", calls=calls,
        kind="masked", is_gaussian=False, checkpoint=types.SimpleNamespace(path="ckpt"),
    )  # fmt: skip
    fake = types.ModuleType("dlm_scale.inference")
    fake.load_for_inference = lambda path, device="auto": inference
    monkeypatch.setitem(sys.modules, "dlm_scale.inference", fake)

    def run(*arguments):
        parser = argparse.ArgumentParser()
        sample.add_arguments(parser)
        assert sample.run(parser.parse_args(["ckpt", *arguments])) == 0
        return capsys.readouterr().out

    run.inference = inference
    return run


def as_json(output):
    return json.loads(output.splitlines()[-1])


def test_a_pipe_gets_plain_text_with_separators(dlm_sample):
    output = dlm_sample("--prompt=hello ", "--max_new_tokens=20", "--num_samples=3")
    texts = output.removesuffix("\n").split("\n---------------\n")
    assert len(texts) == 3 and len(set(texts)) == 3
    assert all(text.startswith("hello ") and len(text) == 26 for text in texts)
    assert "\x1b" not in output and "_" not in output
    assert dlm_sample("--prompt", "hello ", "--max_new_tokens", "20", "--num_samples", "3") == output


def test_the_text_depends_on_the_seed_and_not_on_the_batch(dlm_sample):
    flags = ("--max_new_tokens=30", "--num_samples=20", "--json")
    many = as_json(dlm_sample(*flags))["samples"]
    assert dlm_sample.inference.calls[0] > 1
    few = as_json(dlm_sample("--max_new_tokens=30", "--num_samples=2", "--json=True"))["samples"]
    assert few == many[:2] and [s["sample"] for s in many] == list(range(20))
    other = as_json(dlm_sample(*flags, "--seed=1"))["samples"]
    assert not {s["text"] for s in many} & {s["text"] for s in other}
    watched = dlm_sample("--max_new_tokens=30", "--num_samples=2", "--animate=True", "--animate_delay=0")
    assert all(s["text"] in watched for s in few) and watched.count("--- step") > 8


def test_flags_of_json(dlm_sample):
    report = as_json(dlm_sample("--start=ab", "--diffusion_steps=3", "--sampler=random", "--json", "--num_samples=1"))
    assert report["num_steps"] == 3 and report["sampler"] == "random" and report["step"] == 7
    only = report["samples"][0]
    assert only["nfe"] == 3 and len(only["tokens"]) == 64 and len(only["text"]) == 64


@pytest.mark.parametrize("sampler, steps", [("ancestral", 5), ("low_confidence", 5), ("first_hitting", 40)])
def test_steps_of_zero_mean_the_default(dlm_sample, sampler, steps):
    report = as_json(dlm_sample(f"--sampler={sampler}", "--steps=0", "--max_new_tokens=40", "--json"))
    assert report["num_steps"] == steps


def test_prompts_take_escapes_and_files(dlm_sample, tmp_path):
    assert dlm_sample(r"--prompt=a\n\nb", "--max_new_tokens=1", "--num_samples=1").startswith("a\n\nb")
    path = tmp_path / "p.txt"
    path.write_text("from a file\n")
    assert dlm_sample(f"--prompt=FILE:{path}", "--max_new_tokens=4", "--num_samples=1").startswith("from a file\n")
    with pytest.raises(UsageError, match="nowhere.txt.*No such file"):
        dlm_sample("--prompt=FILE:nowhere.txt")


def test_infilling_keeps_the_text_around_the_holes(dlm_sample):
    output = dlm_sample("--infill=the <mask:5> sat on <mask>.", "--num_samples=8", "--sampler=entropy")
    for text in output.removesuffix("\n").split("\n---------------\n"):
        assert text[:4] == "the " and text[9:17] == " sat on " and text[18:] == "." and len(text) == 19
    with pytest.raises(UsageError, match="needs a hole"):
        dlm_sample("--infill=no hole")


def test_argmax_is_the_same_for_all_samples(dlm_sample):
    for flag in ("--sample=False", "--temperature=0"):
        report = as_json(dlm_sample("--prompt=a", "--sampler=entropy", flag, "--json"))
        assert len({s["text"] for s in report["samples"]}) == 1


def test_text_ends_before_the_stop_token(dlm_sample):
    flags = ("--prompt=ee", "--max_new_tokens=60", "--sampler=random", "--num_samples=6", "--json")
    plain = as_json(dlm_sample(*flags))["samples"]
    cut = as_json(dlm_sample(*flags, "--stop_token=e", r"--stop_token=\n"))["samples"]
    assert any(len(s["text"]) < 62 for s in cut)
    for stopped, whole in zip(cut, plain):
        assert whole["text"].startswith(stopped["text"]) and not set(stopped["text"][2:]) & {"e", "\n"}
    with pytest.raises(UsageError, match="'ab' is 2 tokens"):
        dlm_sample("--stop_token=ab")


def test_strips_are_saved(dlm_sample, tmp_path):
    dlm_sample(f"--html={tmp_path / 'a.html'}", f"--png={tmp_path / 'a.png'}", "--max_new_tokens=9")
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "a.png"}
    assert (tmp_path / "a.html").read_text(encoding="utf-8").count("<tr>") > 2


def test_a_terminal_sees_it_live(dlm_sample, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    dlm_sample("--prompt=hi ", "--max_new_tokens=12", "--num_samples=2", "--animate_delay=0")
    assert terminal.getvalue().count("\x1b[J") >= 4 and "\x1b[36mhi \x1b[0m" in terminal.getvalue()
    still = Terminal()
    monkeypatch.setattr(sys, "stdout", still)
    dlm_sample("--prompt=hi ", "--max_new_tokens=12", "--num_samples=2", "--animate=False")
    assert "\x1b" not in still.getvalue()
    assert all(text in terminal.getvalue() for text in still.getvalue().split("---------------\n"))


def test_blocks_go_beyond_the_context(dlm_sample):
    flags = ("--prompt=hello ", "--max_new_tokens=150", "--block_size=16", "--num_samples=2", "--json")
    report = as_json(dlm_sample(*flags))
    assert report["num_steps"] == 150 and report["block_size"] == 16 and report["context"] == 64
    assert all(len(s["text"]) == 156 and s["text"].startswith("hello ") for s in report["samples"])
    few = as_json(dlm_sample(*flags, "--sampler=threshold", "--steps=20", "--cache=prefix", "--refresh_every=2"))
    assert all(s["nfe"] == 20 for s in few["samples"])
    cut = as_json(dlm_sample(*flags, "--sampler=random", "--stop_token=e"))["samples"]
    assert all("e" not in s["text"][6:] and len(s["tokens"]) < 156 for s in cut)


def test_guidance_and_biases(dlm_sample):
    flags = ("--prompt=hello ", "--max_new_tokens=30", "--sampler=low_confidence", "--steps=10", "--json")
    plain, guided = (as_json(dlm_sample(*flags, *more))["samples"] for more in ((), ("--guidance=2",)))
    assert [s["nfe"] for s in guided] == [20] * 3 and plain[0]["nfe"] == 10
    assert not {s["text"] for s in guided} & {s["text"] for s in plain}
    banned = dlm_sample(*flags, "--logit_bias=e=-inf", r"--logit_bias=\n=-inf", "--confidence_bias=a=-3.5")
    report = as_json(banned)
    assert not {c for s in report["samples"] for c in s["text"][6:]} & {"e", "\n"}
    assert list(report["confidence_bias"].values()) == [-3.5] and "Infinity" not in banned
    assert list(report["logit_bias"].values()) == ["-inf"] * 2


def test_revised_tokens_have_their_own_colour(dlm_sample, tmp_path):
    dlm_sample(f"--html={tmp_path / 'a.html'}", "--sampler=remdm_conf", "--steps=60", "--max_new_tokens=12")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count('<span class="revised">') > 1  # the legend has one


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cache=dual"], "--cache dual keeps keys within a block: name one with --block_size"),
        (["--block_size=4", "--refresh_every=3"], "--refresh_every needs --cache"),
        (["--block_size=65", "--max_new_tokens=90"], "cannot sample: rows of 90 positions are longer.*of at most 64"),
        (["--block_size=8", "--max_new_tokens=90", "--steps=5"], "12 blocks need 12 steps at least, not 5"),
        (["--block_size=8", "--max_new_tokens=2000000"], "the limit .* is 1048576: shorten by 951424"),
        (["--confidence_bias=a=1"], "cannot sample: confidence_bias needs an order by score"),
        (["--confidence_bias=a"], "'a' is not TOKEN=VALUE"),
        (["--logit_bias=a=inf"], "'a=inf' is not TOKEN=VALUE"),
        (["--logit_bias=ab=1"], "--logit_bias 'ab' is 2 tokens"),
        (["--guidance=-1"], "--guidance must be between 0"),
        (["--max_new_tokens=100", "--prompt=abc"], r"prompt \(3 tokens\).*\(100\) = 103 tokens.* 64: shorten by 39"),
        (["--infill=a<mask:90>"], "91 tokens.*64: shorten by 27"),
        (["--sampler=ancestrel"], "'ancestrel'.*did you mean 'ancestral'"),
        (["--steps=-1"], "--steps must be between 0"),
        (["--temperature=nan"], "--temperature"),
        (["--top_p=0"], "--top_p"),
        (["--seed=18446744073709551616"], "--seed"),
        (["--num_samples=0"], "--num_samples"),
        (["--prompt=a", "--infill=<mask>"], "exclude each other"),
        (["--out_dir=elsewhere"], "one checkpoint"),
        (["--prompt=A"], "character 'A'"),
        (["--prompt=\udcff"], "cannot read the text"),
        (["--png=no/such/folder/a.png"], "folder does not exist"),
    ],
)
def test_bad_flags_are_refused_with_one_clear_message(dlm_sample, flags, message):
    with pytest.raises(UsageError, match=message):
        dlm_sample(*flags)


def test_a_checkpoint_without_tokenizer_is_refused(dlm_sample):
    dlm_sample.inference.tokenizer = None
    with pytest.raises(UsageError, match="synthetic"):
        dlm_sample()


def test_help_and_the_list_of_samplers_import_nothing_heavy():
    code = (
        "import sys, dlm_scale.sample as s; from dlm_scale.sampling import SAMPLERS; import argparse;"
        "s.add_arguments(argparse.ArgumentParser());"
        "print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)), len(SAMPLERS))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "18"]
