"""The Python interface: `Inference.generate` and `stream` over a real checkpoint."""

import contextlib
import io
import json

import pytest

from dlm_scale.cli import main
from dlm_scale.errors import UsageError
from dlm_scale.inference import load_for_inference
from tests.faults.specimen import make_specimen


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_specimen(tmp_path_factory.mktemp("specimen")).run


def test_generate_gives_what_the_command_gives(run_folder):
    inference = load_for_inference(run_folder, device="cpu")
    made = inference.generate(["the ", "fox"], num_samples=2, max_new_tokens=5, steps=4, seed=7, stop_token=["e"])
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        flags = ["--prompt=the ", "--max_new_tokens=5", "--steps=4", "--seed=7", "--stop_token=e", "-n=2", "--json"]
        assert main(["sample", str(run_folder), *flags]) == 0
    told = json.loads(stdout.getvalue())["samples"]
    assert [(s.index, s.text, s.ids, s.nfe) for s in made[0]] == [
        (t["sample"], t["text"], t["tokens"], t["nfe"]) for t in told
    ]
    assert [len(samples) for samples in made] == [2, 2] and made[1][0].text.startswith("fox")


def test_holes_and_streams(run_folder):
    inference = load_for_inference(run_folder, device="cpu")
    [[sample]] = inference.generate(["fox <mask:3> ov<mask>"], is_infill=True)
    assert sample.text[:4] == "fox " and sample.text[7:10] == " ov" and len(sample.text) == 11
    states = list(inference.stream("the ", num_samples=3, sampler="random", max_new_tokens=6, steps=3))
    assert [int(state.is_masked_BL.sum()) for state in states] == [18, 12, 6, 0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "ancestrel"}, "did you mean"),
        ({"temperature": -1}, "--temperature must be"),
        ({"step": 3}, "step is not an option of sampling"),
        ({"device": "cuda"}, "device is not an option"),
        ({"max_new_tokens": 99}, "shorten by"),
    ],
)
def test_wrong_options_are_refused(run_folder, options, message):
    inference = load_for_inference(run_folder, device="cpu")
    with pytest.raises(UsageError, match=message):
        inference.generate(["the"], **options)
    with pytest.raises(UsageError, match="a list of texts"):
        inference.generate("the")
