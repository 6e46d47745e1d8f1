"""The autoregressive twin: a normalised law, the same at every layout, resumed exactly, evaluated in the same keys."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from dlm_scale import cli
from dlm_scale.config import config_from_dict
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.diffusion.autoregressive import shifted
from dlm_scale.engine.evaluation import autoregressive_sums, cross_entropy_fn
from dlm_scale.errors import UsageError
from dlm_scale.ops import Causal
from tests.engine.cases import Case, case_config, differences, import_distributed, run_engine
from tests.engine.test_training import lines, run, status
from tests.forked import run_ranks
from tests.model.test_model import made, randomised

TWIN = "objective.kind=autoregressive"


def nll_of(model, x_BL, vocabulary):
    sums = autoregressive_sums(cross_entropy_fn(model, torch.device("cpu")), vocabulary.mask_id)
    with torch.no_grad():
        return sums(x_BL.numpy(), np.arange(len(x_BL)))


def test_the_likelihood_is_of_a_normalised_law_over_whole_rows():
    """All L tokens are predicted, the first from nothing: the probabilities of all rows add up to 1."""
    vocabulary = Vocabulary(5, 2, (4,))  # three ids of text: 0, 1, 3
    model = randomised(made(vocabulary, num_layers=1, hidden_size=16, num_heads=2))
    x_XL = torch.tensor(list(itertools.product((0, 1, 3), repeat=5)))
    sums = nll_of(model, x_XL, vocabulary)
    assert np.exp(-sums.weighted_ce_RK[:, 0]).sum() == pytest.approx(1.0, abs=1e-5)
    assert (sums.weighted_ce_RK[:, 0] == sums.weighted_ce_RK[:, 1]).all() and (sums.num_maskable_R == 5).all()


def test_a_token_is_predicted_from_those_before_it_alone():
    vocabulary, generator = Vocabulary(12, 11), torch.Generator().manual_seed(0)
    model, x_BL = randomised(made(vocabulary)), torch.randint(0, 11, (1, 12), generator=generator)
    ce_fn = cross_entropy_fn(model, torch.device("cpu"))
    options = {"mask_id": 11, "denominator": 1.0, "causal": Causal()}
    one = lambda x: ce_fn(shifted(x.numpy(), np.zeros(1, int), **options))  # noqa: E731
    with torch.no_grad():
        before = one(x_BL)
        for place in (0, 5, 11):
            other = x_BL.clone()
            other[0, place] = (x_BL[0, place] + 1) % 11
            changed = (one(other) != before).nonzero()[:, 0].tolist()
            assert changed[0] == place and changed == list(range(place, 12))


def test_what_is_not_maskable_is_read_and_carries_no_loss():
    x_BL, maskable_BL = np.arange(12).reshape(2, 6), np.array([[False] * 2 + [True] * 4, [True] * 5 + [False]])
    c = shifted(x_BL, np.arange(2), mask_id=99, denominator=None, causal=Causal(), maskable_BL=maskable_BL)
    assert c.xt_BL.tolist() == [[99, 0, 1, 2, 3, 4], [99, 6, 7, 8, 9, 10]]
    assert c.rows_N.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10] and c.target_N.tolist() == c.rows_N.tolist()
    assert (c.weight_N == 1).all() and c.num_maskable_B.tolist() == [4, 5] and c.segment_N.tolist() == [0] * 4 + [1] * 5


@pytest.mark.parametrize("bad, words", [
    ({"model__time_conditioning": "adaln"}, "model.time_conditioning"),
    ({"diffusion__schedule": "cosine", "diffusion__weighting": "elbo"}, "diffusion.schedule"),
    ({"diffusion__weighting": "simple"}, "diffusion.weighting"),
    ({"data__random_length_share": 0.1}, "data.random_length_share"),
    ({"data__packing": "best_fit", "data__train": "somewhere"}, "data.packing"), ({"model__logit_shift": True}, "logit_shift"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(bad, words):
    with pytest.raises(UsageError, match=words):
        case_config(objective__kind="autoregressive", **bad)
    raw = json.loads(case_config(objective__kind="autoregressive").model_dump_json())
    assert config_from_dict(raw).objective.kind == "autoregressive"


LAYOUTS = {  # ranks: the cases that run in one process group
    1: [Case(0, 1, 1)], 2: [Case(1, 2, 1, 2, True), Case(3, 2, 1, 1, False)], 4: [Case(3, 2, 2, 1, True)],
}


def run_layout(ranks):
    from dlm_scale.engine.runtime import start_runtime

    cases = LAYOUTS[ranks]
    runtime = start_runtime("cpu", cases[0].tensor)
    results = [run_engine(runtime, case.config(objective__kind="autoregressive"), 5) for case in cases]
    return results if runtime.is_first else []


def test_layout_and_stage_do_not_change_the_twin():
    import_distributed()
    alone, *others = [result for ranks in LAYOUTS for result in run_ranks(ranks, run_layout, ranks)[0]]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in alone["lines"])
    for other in others:
        found = differences(other, alone)
        assert found["hashes"] == 0 and max(found["loss"], found["grad_norm"], found["weights"]) < 1e-5, found


@pytest.fixture(scope="module")
def twin_run(config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("twin")
    assert run(config_file, out, TWIN) == 0
    return out


def test_stop_and_resume_is_bit_equal(twin_run, config_file, tmp_path):
    assert run(config_file, tmp_path, TWIN, "train.stop_at_step=5") == 0
    assert run(config_file, tmp_path, TWIN) == 0
    assert status(tmp_path)["weights_hash"] == status(twin_run)["weights_hash"]
    assert run(config_file, tmp_path) == 2  # the masked model is another run


def test_evaluate_gives_the_exact_likelihood_in_the_same_keys(twin_run, config_file, capfd, tmp_path):
    arguments = ["evaluate", str(twin_run), "--max_rows=8", "--batch_size=4", "--device=cpu", "--weights=raw"]
    assert run_ranks(1, cli.main, arguments)[0] == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    last = [line for line in lines(twin_run) if "val_nelbo" in line][-1]
    assert report["nelbo"] == pytest.approx(last["val_nelbo"], abs=1e-6) and report["likelihood"] == "exact"
    assert report["nelbo_se_mc"] == last["val_nelbo_se_mc"] == 0 and report["nelbo_se"] > 0
    assert {"ppl", "tokens", "bits_per_byte"} <= report.keys() and report["tokens"] == 8 * 16
    assert report["bits_per_character"] == pytest.approx(report["nelbo"] / math.log(2))
    assert run_ranks(1, cli.main, [*arguments, "--likelihood=l2r"])[0] == 2
    assert "autoregressive" in capfd.readouterr().err
    assert run_ranks(1, cli.main, ["sample", str(twin_run), "--device=cpu", "--sampler=ancestral"])[0] == 2
    assert "left to right" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_control_learns_tinyshakespeare(shared_data, repository_root, tmp_path):
    """The reference of the diffusion model's gate: below 2.15 nats a character after 200 steps."""
    from dlm_scale.data.prepare import prepare

    prepare(str(shared_data("tinyshakespeare.txt")), "char", tmp_path / "data")
    config = repository_root / "configs" / "shakespeare_char_tiny.yaml"
    data = [f"data.train={tmp_path}/data/train", f"data.validation={tmp_path}/data/val"]
    settings = [*data, f"train.out={tmp_path}/run", "train.stop_at_step=200", "train.num_steps=500",
                "train.eval_every=200", "train.device=cpu", TWIN]
    assert run_ranks(1, cli.main, ["train", str(config), *settings], seconds=1700)[0] == 0
    assert [line for line in lines(tmp_path / "run") if "val_nelbo" in line][-1]["val_nelbo"] < 2.15
