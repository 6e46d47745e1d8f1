"""Sampling of autoregressive checkpoints: each token from those before it, whatever else is in the batch."""

import contextlib
import io
import json

import pytest
import torch

from dlm_scale.cli import Command, exit_code, main, run_command
from dlm_scale.diffusion.autoregressive import moved_right
from dlm_scale.inference import load_for_inference
from dlm_scale.ops import Causal
from dlm_scale.sampling import generate
from tests.faults.specimen import make_specimen
from tests.forked import run_ranks

BATCH = Command("", "dlm_scale.sample_batch")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    return make_specimen(folder, more="objective: {kind: autoregressive}\n", noise=0.3).run


@pytest.fixture(scope="module")
def twin(run_folder):
    return load_for_inference(run_folder, device="cpu")


def run(program, *arguments):
    """(exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program(list(map(str, arguments)))
    return code, out.getvalue(), err.getvalue()


def batch(arguments):
    return exit_code(lambda: run_command(BATCH, arguments, "sample_batch"))


def greedy(twin, ids, count):
    """The likeliest continuation, by rows that end with the token asked for."""
    for _ in range(count):
        x_BL = moved_right(torch.tensor([[*ids, 0]]), twin.vocabulary.mask_id)
        last = torch.tensor([len(ids)])
        with torch.no_grad():
            best = twin.model(x_BL, m_B=None, rows_N=last, readout=lambda head: head.logits(), attention=Causal())
        ids = [*ids, int(best.argmax())]
    return ids


def test_each_token_is_drawn_given_those_before_it(run_folder, twin):
    prompts = ("", "the ", "over the lazy")
    ids = [twin.tokenizer.encode(prompt).tolist() for prompt in prompts]
    expected = [greedy(twin, row, 16 - len(row)) for row in ids]
    made = twin.generate(prompts, temperature=0.0)
    assert [sample.ids for [sample] in made] == expected and len(set(map(str, expected))) == 3
    assert [sample.nfe for [sample] in made] == [16 - len(row) for row in ids]
    code, told, _ = run(main, "sample", run_folder, "--prompt=the ", "--temperature=0", "-n=1", "--json", "--device=cpu")
    told = json.loads(told)
    assert code == 0 and told["sampler"] == "left_to_right" and told["samples"][0]["tokens"] == expected[1]
    [[holes]] = twin.generate(["the <mask:12>"], is_infill=True, temperature=0.0)  # a prompt by another name
    assert holes.ids == expected[1]


def test_text_may_outgrow_the_context(twin):
    options = {"temperature": 0.7, "seed": 4}
    [[within]] = twin.generate(["the "], **options)
    [[beyond]] = twin.generate(["the "], max_new_tokens=30, block_size=1, **options)
    assert beyond.ids[:16] == within.ids and len(beyond.ids) == 34
    [[last]] = twin.generate(["the "], max_new_tokens=30, block_size=1, temperature=0.0)
    assert last.ids[-1] == greedy(twin, last.ids[-16:-1], 1)[-1]  # the window moves on


def test_rows_do_not_know_of_each_other(twin):
    mask, ids = twin.vocabulary.mask_id, twin.tokenizer.encode("fox jumps").tolist()
    x_BL = torch.tensor([ids[:count] + [mask] * (12 - count) for count in (1, 9, 4)])
    settings = {"sampler": "left_to_right", "seed": 5, "mask_id": mask}
    together = generate(twin.predict, x_BL, x_BL != mask, num_steps=11, request_hashes=[7, 8, 9],
                        sample_indices=[0, 1, 2], **settings)  # fmt: skip
    for row in range(3):
        x_1L = x_BL[row : row + 1]
        alone = generate(twin.predict, x_1L, x_1L != mask, num_steps=12, request_hashes=[7 + row],
                         sample_indices=[row], **settings)  # fmt: skip
        assert alone.ids_BL[0].tolist() == together.ids_BL[row].tolist()
        assert alone.nfe_B[0] == together.nfe_B[row] == (x_1L == mask).sum()


def test_batches_do_not_show_the_batch_the_ranks_or_the_split(run_folder, twin, tmp_path):
    prompts = [{"id": i, "prompt": "the quick fox"[: i % 5], "max_new_tokens": 4 + i % 3} for i in range(12)]
    prompts += [{"id": "holes", "text": "fox <mask:3> over"}, {"id": "tokens", "tokens": [1, 29, 3]},
                {"id": "open", "tokens": [1, 29, 29]}]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    flags = [str(run_folder), f"--input={tmp_path}/in.jsonl", "--num_samples=2", "--device=cpu"]

    def made(name, *more, ranks=0):
        arguments = [*flags, f"--output={tmp_path}/{name}", *more]
        codes = run_ranks(ranks, batch, arguments) if ranks else [run(batch, *arguments)[0]]
        assert not any(codes)
        return (tmp_path / name).read_bytes()

    whole = made("1", "--batch_size=1")
    assert whole == made("7", "--batch_size=7") == made("64", "--batch_size=64") == made("r", "--batch_size=5", ranks=2)
    assert made("split", "--tensor_parallel_size=2", ranks=2) == whole
    errors = [json.loads(line) for line in (tmp_path / "1.errors.jsonl").read_text().splitlines()]
    assert [error["line"] for error in errors] == [13, 14] and "behind a hole" in errors[0]["error"]
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == 26 and {row["nfe"] for row in rows[:24]} == {4, 5, 6} and len({r["text"] for r in rows}) > 20
    sure = [json.loads(line) for line in made("sure", "--temperature=0").splitlines()]
    assert [row["tokens"] for row in sure[:2]] == [greedy(twin, [], 4)] * 2


@pytest.mark.parametrize("flags, words", [
    (["--sampler=entropy"], "--sampler entropy: this checkpoint is autoregressive"), (["--steps=8"], "--steps 8"),
    (["--guidance=1"], "--guidance 1"), (["--block_size=4"], "or give 1 for text beyond the context"),
    (["--block_size=1", "--cache=prefix"], "--cache prefix"), (["--infill=a <mask:3> b"], "behind a hole"),
])  # fmt: skip
def test_what_only_masked_checkpoints_can_do_is_refused(run_folder, flags, words):
    code, out, said = run(main, "sample", run_folder, "--device=cpu", *flags)
    assert code == 2 and out == "" and len(said.splitlines()) == 1 and words in said


def test_masked_checkpoints_have_their_own_samplers(tmp_path):
    masked = make_specimen(tmp_path).run
    code, _, said = run(main, "sample", masked, "--device=cpu", "--sampler=left_to_right")
    assert code == 2 and "only autoregressive checkpoints have it" in said
