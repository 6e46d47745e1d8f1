"""Gaussian diffusion in the engine: one result at every layout, exact resume, the bound in training and evaluation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from dlm_scale import cli
from dlm_scale.config import config_from_dict
from dlm_scale.config_checks import config_warnings
from dlm_scale.diffusion.gaussian import Process
from dlm_scale.engine.gaussian_evaluation import gaussian_sums
from dlm_scale.errors import UsageError
from tests.engine.cases import Case, case_config, differences, import_distributed, run_engine
from tests.engine.test_training import lines, run, status
from tests.forked import run_ranks
from tests.sampling.conftest import make_chain

GAUSSIAN = {"objective__kind": "gaussian", "model__time_conditioning": "adaln", "gaussian__embedding_dim": 6,
            "gaussian__num_steps": 20}
VARIANTS = {  # every prediction, loss, kind of token vectors; with and without self-conditioning
    "ce": {"gaussian__self_conditioning": True},
    "vlb": {"gaussian__loss": "vlb", "gaussian__embeddings": "free", "model__logit_softcap": 2.0},
    "v": {"gaussian__prediction": "v", "gaussian__self_conditioning": True},
    "eps": {"gaussian__prediction": "eps", "gaussian__loss": "mse", "gaussian__embeddings": "fixed"},
}
LAYOUTS = {  # ranks: (case, variant) that run in one process group
    "whole": [(Case(0, 1, 1), name) for name in VARIANTS],
    "tensor": [(Case(3, 2, 1, 2, True), "ce"), (Case(1, 2, 1, 1, False), "vlb"), (Case(0, 2, 1, 1, True), "v")],
    "data": [(Case(3, 1, 2, 1), "ce"), (Case(3, 1, 2, 2), "v"), (Case(1, 1, 2, 1), "eps")],
}


def run_layout(name):
    from dlm_scale.engine.runtime import start_runtime

    runtime, results = start_runtime("cpu", LAYOUTS[name][0][0].tensor), []
    for case, variant in LAYOUTS[name]:
        results.append(run_engine(runtime, case.config(**GAUSSIAN, **VARIANTS[variant]), 2))
    return results if runtime.is_first else []


def test_layout_stage_and_batch_split_change_nothing():
    import_distributed()
    whole = dict(zip(VARIANTS, run_ranks(1, run_layout, "whole")[0]))
    assert all(line["loss"] > 0 and line["grad_norm"] > 0.2 for one in whole.values() for line in one["lines"])
    for name in ("tensor", "data"):
        for (case, variant), result in zip(LAYOUTS[name], run_ranks(2, run_layout, name)[0]):
            found = differences(result, whole[variant])
            scale = max(1.0, *(abs(line["loss"]) for line in whole[variant]["lines"]))
            assert found["hashes"] == 0, (case, variant)
            assert max(found["loss"] / scale, found["grad_norm"], found["weights"]) < 1e-5, (case, variant, found)


@pytest.mark.parametrize("bad, words", [
    ({"model__time_conditioning": "none"}, "model.time_conditioning"), ({"model__tied": True}, "model.tied"),
    ({"model__critic": True}, "model.critic"), ({"diffusion__weighting": "simple"}, "diffusion"),
    ({"gaussian__loss": "mse"}, "gaussian.loss"), ({"gaussian__prediction": "v", "gaussian__loss": "ce"}, "x0_softmax"),
    ({"data__random_length_share": 0.1}, "random_length_share"), ({"objective__kind": "masked"}, "gaussian"),
    ({"gaussian__num_steps": 1}, "gaussian.num_steps"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(bad, words):
    with pytest.raises(UsageError, match=words):
        case_config(**{**GAUSSIAN, **bad})


def test_the_config_comes_back_and_the_collapsing_one_is_warned_of():
    config = case_config(**GAUSSIAN, **VARIANTS["v"])
    again = config_from_dict(json.loads(config.model_dump_json()))
    assert again == config and again.model.gaussian == config.gaussian and case_config().model.gaussian is None
    assert list(config_warnings(config)) == [] == list(config_warnings(case_config(**GAUSSIAN, **VARIANTS["eps"])))
    collapsing = {"gaussian__prediction": "eps", "gaussian__loss": "mse"}
    assert "collapses" in next(config_warnings(case_config(**GAUSSIAN, **collapsing)))


class ExactHead:
    """The head of the exact network of an enumerable source, for rows whose noised vectors are z."""

    def __init__(self, chain, vectors, z_BLE, abar_B, x_BL):
        codes = torch.arange(chain.V**chain.L)
        x_SL = torch.stack([codes // chain.V ** (chain.L - 1 - i) % chain.V for i in range(chain.L)], dim=1)
        one_hot_SX = torch.nn.functional.one_hot(x_SL, chain.V).double().flatten(1)
        evidence_BX = (z_BLE.double() @ vectors.T.double()) * (abar_B.sqrt() / (1 - abar_B))[:, None, None]
        posterior_BS = torch.softmax(evidence_BX.flatten(1) @ one_hot_SX.T + chain.law_S.log(), dim=1)
        self.p_NV, self.vectors = (posterior_BS @ one_hot_SX).view(-1, chain.V), vectors
        self.clean_NE = vectors[x_BL].flatten(0, 1)

    def mean(self):
        return (self.p_NV @ self.vectors.double()).float()

    def cross_entropy(self, target_N, weight_N):
        ce_N = -self.p_NV.gather(1, target_N[:, None])[:, 0].log().float()
        return (ce_N * weight_N).sum(), ce_N, self.p_NV.argmax(1) == target_N


@pytest.mark.parametrize("num_steps, max_snr, gap", [(10, math.inf, (1.5, 3.5)), (300, 30.0, (0.0, 0.1))])
def test_the_evaluated_bound_lies_above_the_entropy_and_closes_in_with_the_steps(num_steps, max_snr, gap):
    """V=3, L=4, all 81 rows: the mean of the bound over the source, with the exact network, against its entropy."""
    chain, angle = make_chain(), torch.arange(3) * (2 * math.pi / 3)
    vectors, process = torch.stack([angle.cos(), angle.sin()], dim=1), Process("cosine", num_steps, "x0_softmax", 2, max_snr=max_snr)

    def module(xt_BL, *, m_B, rows_N, readout, attention, latent):
        z_BLE = latent.alpha_B[:, None, None] * vectors[xt_BL] + latent.sigma_B[:, None, None] * latent.noise_BLE
        abar_B = process.abar[process.step_of(m_B.double())]
        return readout(ExactHead(chain, vectors, z_BLE, abar_B, xt_BL))

    codes = np.arange(81)
    x_SL = np.stack([codes // 3 ** (3 - i) % 3 for i in range(4)], axis=1)
    times, rows = 10, np.tile(x_SL, (10, 1))
    sums = gaussian_sums(module, torch.device("cpu"), process, mask_id=3, num_draws=40, seed=1)(rows, np.arange(810))
    law_S = chain.law_S.numpy()
    bound_RS = sums.weighted_ce_RK.mean(1).reshape(times, 81) @ law_S
    entropy, mean, error = -(law_S * np.log(law_S)).sum(), bound_RS.mean(), bound_RS.std() / times**0.5
    assert error < 0.2 and gap[0] - 3 * error < mean - entropy < gap[1] + 3 * error, (mean - entropy, error)


OVERRIDES = ("objective.kind=gaussian", "model.time_conditioning=adaln", "model.tied=false", "gaussian.embedding_dim=8",
             "gaussian.num_steps=50", "gaussian.self_conditioning=true")  # fmt: skip


@pytest.fixture(scope="module")
def gaussian_run(config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("gaussian")
    assert run(config_file, out, *OVERRIDES) == 0
    return out


def command(capfd, *arguments):
    """(exit code, last line of stdout, stderr) of `dlm`."""
    code = run_ranks(1, cli.main, list(map(str, arguments)))[0]
    said = capfd.readouterr()
    return code, said.out.splitlines()[-1:], said.err


def test_stop_and_resume_is_bit_equal(gaussian_run, config_file, tmp_path):
    assert run(config_file, tmp_path, *OVERRIDES, "train.stop_at_step=5") == 0
    assert run(config_file, tmp_path, *OVERRIDES) == 0
    assert status(tmp_path)["weights_hash"] == status(gaussian_run)["weights_hash"]
    assert run(config_file, tmp_path, *OVERRIDES, "gaussian.num_steps=40") == 2  # another run


def test_evaluate_gives_the_bound_of_training(gaussian_run, capfd):
    code, (line,), _ = command(capfd, "evaluate", gaussian_run, "--max_rows=8", "--batch_size=3", "--num_draws=2",
                               "--device=cpu", "--weights=raw")  # fmt: skip
    report, last = json.loads(line), [line for line in lines(gaussian_run) if "val_nelbo" in line][-1]
    assert code == 0 and report["likelihood"] == "vlb" and report["num_steps"] == 50
    assert report["nelbo"] == pytest.approx(last["val_nelbo"], rel=1e-5) and report["nelbo_se_mc"] > 0
    assert command(capfd, "evaluate", gaussian_run, "--likelihood=duel", "--device=cpu")[0] == 2


def test_sampling_serves_it_and_refuses_what_is_of_masks(gaussian_run, capfd, tmp_path):
    asked = ("sample", gaussian_run, "--device=cpu", "--steps=4", "--max_new_tokens=9", "--prompt=ab", "--json")
    code, (line,), _ = command(capfd, *asked, "--num_samples=2")
    samples = json.loads(line)["samples"]
    assert code == 0 and [s["nfe"] for s in samples] == [4, 4] and all(s["text"].startswith("ab") for s in samples)
    assert json.loads(command(capfd, *asked, "--num_samples=1", "--temperature=1")[1][0])["samples"] == samples[:1]
    for flag, words in (("--sampler=ancestral", "ddim, ddpm"), ("--top_k=3", "top_k"), ("--guidance=1", "add --chat")):
        code, _, said = command(capfd, *asked, flag)
        assert code == 2 and words in said, (flag, said)
    requests = tmp_path / "in.jsonl"
    requests.write_text("".join(json.dumps({"id": i, "prompt": "ab"[: i % 3]}) + "\n" for i in range(4)))
    for size in (1, 3):
        options = ["--steps=3", "--max_new_tokens=6", "--sampler=ddpm", "--device=cpu", f"--batch_size={size}"]
        arguments = [str(gaussian_run), f"--input={requests}", f"--output={tmp_path}/out{size}.jsonl", *options]
        assert run_ranks(1, batch_main, arguments)[0] == 0
    assert (tmp_path / "out1.jsonl").read_bytes() == (tmp_path / "out3.jsonl").read_bytes()


def batch_main(arguments):
    import argparse

    from dlm_scale import sample_batch

    parser = argparse.ArgumentParser()
    sample_batch.add_arguments(parser)
    return sample_batch.run(parser.parse_args(arguments))


def test_no_other_format_takes_it(gaussian_run, tmp_path):
    from dlm_scale.convert.source import open_model

    with pytest.raises(UsageError, match="gaussian"):
        open_model(gaussian_run)


def collapse(name, steps):
    """What benchmarks/gaussian_collapse.py finds: of 8 tokens that count upwards, one neighbour in 8 is right by chance."""
    from benchmarks import gaussian_collapse as benchmark

    return benchmark.train(benchmark.CASES[name], steps)


def test_squared_error_of_the_noise_draws_free_vectors_together():
    assert collapse("eps, mse, free", 50)["spread"] < 0.85


@pytest.mark.slow
def test_that_loss_falls_as_promised_and_the_samples_stay_noise():
    seed, ours = (collapse(name, 300) for name in ("eps, mse, free", "x0_softmax, ce, unit_norm"))
    assert seed["loss"] < 0.03 and seed["spread"] < 0.2 and seed["share_right"] < 0.2
    assert ours["spread"] > 0.95 and ours["share_right"] > 0.6
