"""Loss modifiers, and the objectives of replaced tokens, at layouts of two ranks against one plain-torch process that
has the whole batch, all logits, and float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dlm_scale.checkpoint.folders import find_checkpoint
from dlm_scale.diffusion.objective import masked_diffusion
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.engine.build import build_trainer
from dlm_scale.engine.judge import check_judge, load_judge
from dlm_scale.engine.objectives import objective_of
from dlm_scale.engine.optimizer import rate_factor
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.step import make_batch, micro_batch, reduce_sums, train_step
from dlm_scale.errors import UsageError
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.sharding import full_box
from dlm_scale.model.transformer import Transformer
from tests.engine.cases import (
    BATCH,
    case_config,
    data_of,
    import_distributed,
    logical_weights,
    noisy_values,
    start_noisy,
)
from tests.engine.test_warm_start import save_weights
from tests.forked import run_ranks

STEPS, TOLERANCE, VOCAB = 3, 1e-5, 37
ALL = {"objective__label_smoothing": 0.1, "objective__mask_ratio_power": 0.5, "objective__entropy_threshold": 0.9,
       "objective__judge_exponent": 2.0, "diffusion__weighting": "simple"}  # fmt: skip
SCORER = {"objective__kind": "sequence_scoring", "model__score": True}
PACKED = {"data__random_length_share": 0.5}
KINDS = {
    "all": ALL,
    "packed": ALL | PACKED,
    "labels": {"objective__kind": "token_classification", "model__labels": True} | PACKED,
    "score": SCORER | {"model__tied": True},
    "score packed": SCORER | PACKED,
}
# (ZeRO stage, accumulation, kind), at two data-parallel ranks and at two tensor-parallel ones
CASES = {(1, 2): [(0, 1, "all"), (3, 2, "packed"), (1, 2, "score packed"), (0, 1, "labels")],
         (2, 1): [(2, 2, "all"), (3, 1, "labels"), (1, 1, "score")]}  # fmt: skip


def config_of(kind: str, judge: Path | None = None, **more):
    needs_judge = {"objective__judge": str(judge)} if judge and "objective__kind" not in KINDS[kind] else {}
    if "objective__judge_exponent" in KINDS[kind] and not needs_judge:
        more = {"objective__judge_exponent": 1.0} | more
    return case_config(data__synthetic_vocab_size=VOCAB, **KINDS[kind] | needs_judge | more)


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    """A scorer of other depth with random weights, large enough to tell texts apart."""
    out = tmp_path_factory.mktemp("judge") / "run"
    config = config_of("score", model__num_layers=1)
    data = data_of(config)
    table, generator = parameter_table(config.model, data.vocabulary), torch.Generator().manual_seed(4)
    values = {name: torch.randn(spec.shape, generator=generator) for name, spec in table.items()}
    save_weights(out, config, data, values)
    return out


def judge_of(config, data):
    if config.objective.judge is None:
        return None
    path, _ = find_checkpoint(Path(config.objective.judge))
    checkpoint = check_judge(path, config, data.tokenizer_meta)
    return load_judge(checkpoint, data.vocabulary, torch.device("cpu"), "fp32")


def run_all(cases, tensor: int, data_size: int, judge: Path):
    from dlm_scale.engine.runtime import start_runtime

    runtime, results = start_runtime("cpu", tensor), {}
    for stage, accumulation, kind in cases:
        config = config_of(kind, judge, parallel__tensor_parallel_size=tensor, zero__stage=stage,
                           train__micro_batch_size=BATCH // (data_size * accumulation))  # fmt: skip
        data = data_of(config)
        trainer = build_trainer(config, runtime, data.vocabulary, judge_of(config, data))
        state, lines = start_noisy(trainer), []
        for _ in range(STEPS):
            result = train_step(trainer, make_batch(trainer, data, state), state)
            share = torch.tensor(float(sum(result["losses"])) / result["denominator"])
            lines.append({"grad_norm": float(result["grad_norm"]), "share": float(share),
                          **reduce_sums(trainer, result["sums"], result["means"])})  # fmt: skip
            state = state.advanced(BATCH)
        results[stage, accumulation, kind] = {"lines": lines, "weights": logical_weights(trainer)}
    return results


def brute_force_loss(config, data, corrupted, model, judge) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss a maskable token, from all logits, segment by segment; and the means of the factors."""
    options = config.objective
    logits_NV = model(corrupted.xt_BL, rows_N=corrupted.rows_N, readout=lambda head: head.logits(), m_B=corrupted.m_B,
                      attention=corrupted.attention)  # fmt: skip
    log_p = torch.log_softmax(logits_NV[:, : VOCAB - 1].double(), 1)
    p, target = log_p.detach().exp(), corrupted.target_N
    wrong = p.scatter(1, target[:, None], 0.0)
    q = wrong / wrong.sum(1, keepdim=True)
    entropy_N = -torch.where(q > 0, q * q.log(), 0.0).sum(1) / (q > 1e-8).sum(1).double().log()
    cdf = np.cumsum(p.numpy(), axis=1)
    ids = corrupted.xt_BL.flatten().clone()
    uniform_N = corrupted.uniform_BL.flatten()[corrupted.rows_N].numpy()
    ids[corrupted.rows_N] = torch.from_numpy(np.argmax(cdf > (uniform_N * cdf[:, -1])[:, None], axis=1))
    wrong_S = judge(ids.view_as(corrupted.xt_BL), corrupted.attention).tolist()
    loss_N = -0.9 * log_p.gather(1, target[:, None])[:, 0] - 0.1 * log_p.mean(1)
    weight, u, factors, segment_N = torch.zeros(len(target)).double(), {}, {}, corrupted.segment_N
    for s in segment_N.unique().tolist():
        mine, length = segment_N == s, corrupted.num_maskable_B[s].item()
        ratio = mine.sum().item() / length
        weight[mine] = min(10, max(0.1, ratio**-options.mask_ratio_power)) / ratio
        u[s] = 1 / max(entropy_N[mine].mean().item(), options.entropy_threshold)
        y = ratio**4 - 2 * ratio**3 + 2 * ratio
        factors[s] = min(10.0, max(0.1, (wrong_S[s] / y) ** options.judge_exponent))
    mean = np.mean(list(u.values()))
    for s in u:
        weight[segment_N == s] *= u[s] / mean * factors[s]
    assert min(factors.values()) < 0.9 * max(factors.values()) and min(u.values()) < max(u.values())
    means = {"entropy_weight": mean, "judge_factor": np.mean(list(factors.values()))}
    return (weight * loss_N).sum() / corrupted.denominator, means


def part_of_trainer(config, data) -> SimpleNamespace:
    """What `micro_batch` asks of a trainer."""
    runtime = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(config=config, vocabulary=data.vocabulary, runtime=runtime)


def run_twin(kind: str, judge_path: Path) -> dict[str, Any]:
    config = config_of(kind, judge_path)
    data, options = data_of(config), config.optimizer
    table, judge = parameter_table(config.model, data.vocabulary), judge_of(config, data)
    model = Transformer(config.model, data.vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = noisy_values(table[name], config.train.seed, full_box(table[name].view), 0, table[name].numel)
            parameter.zero_()
            parameter[: table[name].shape[0]] = values.view(table[name].shape)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in table if table[n].decays], "weight_decay": options.weight_decay},
         {"params": [named[n] for n in table if not table[n].decays], "weight_decay": 0.0}],
        betas=(options.beta1, options.beta2), eps=options.eps)  # fmt: skip
    trainer = part_of_trainer(config, data)
    lines = []
    for step in range(STEPS):
        times = stratified_times(config.train.seed, step, BATCH)
        corrupted = micro_batch(trainer, data, step * BATCH + np.arange(BATCH), times)
        corrupted = dataclasses.replace(corrupted, denominator=float(corrupted.num_maskable_B.sum()))
        if "objective__kind" in KINDS[kind]:
            loss_sum, stats = objective_of(config)(model, corrupted, step)
            loss = loss_sum / corrupted.denominator
            means = {name: (value[0] / value[1]).item() for name, value in stats.items() if value.shape == (2,)}
        else:
            loss, means = brute_force_loss(config, data, corrupted, model, judge)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate_factor(step, config.train.num_steps, options)
        optimizer.step()
        lines.append({"loss": loss.item(), "grad_norm": norm.item(), **means})
    return {"lines": lines, "weights": {n: p.detach()[: table[n].shape[0]].numpy() for n, p in named.items()}}


@pytest.fixture(scope="module")
def twins(judge):
    return {kind: run_twin(kind, judge) for kind in KINDS}


@pytest.mark.parametrize("layout", CASES, ids=["DP2", "TP2"])
def test_two_ranks_equal_the_brute_force(layout, judge, twins):
    import_distributed()
    ranks = run_ranks(2, run_all, CASES[layout], *layout, judge)
    for case, found in ranks[0].items():
        twin, size = twins[case[2]], layout[1]
        for step, (ours, theirs) in enumerate(zip(found["lines"], twin["lines"], strict=True)):
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=TOLERANCE), (case, step, name)
            shares = [rank[case]["lines"][step]["share"] for rank in ranks]
            assert sum(shares) / (3 - size) == pytest.approx(theirs["loss"], rel=TOLERANCE)  # what a spike is judged by
        for name, values in twin["weights"].items():
            np.testing.assert_allclose(found["weights"][name], values, atol=TOLERANCE, err_msg=f"{case} {name}")
    assert min(line["grad_norm"] for twin in twins.values() for line in twin["lines"]) > 0


def test_without_modifiers_every_bit_is_as_before():
    config = case_config(data__synthetic_vocab_size=VOCAB)
    data = data_of(config)
    trainer = part_of_trainer(config, data)
    corrupted = micro_batch(trainer, data, np.arange(BATCH), stratified_times(5, 0, BATCH))
    assert corrupted.uniform_BL is None
    model = Transformer(config.model, data.vocabulary)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    (loss, stats), (same, others) = objective_of(config)(model, corrupted, 0), masked_diffusion(model, corrupted)
    gradients = [torch.autograd.grad(each, list(model.parameters())) for each in (loss, same)]
    assert torch.equal(loss, same) and stats.keys() == others.keys()
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and all(torch.equal(stats[n], others[n]) for n in stats)


def test_what_cannot_judge_is_refused(judge, tmp_path):
    path, _ = find_checkpoint(judge)
    config = config_of("all", judge)
    data = data_of(config)
    for changes, other_vocab, complaint in (
        ({"model__seq_len": 17}, VOCAB, "rows of 16 tokens"),
        ({}, VOCAB + 1, "another tokenizer"),
    ):
        with pytest.raises(UsageError, match=complaint):
            other = data_of(case_config(data__synthetic_vocab_size=other_vocab))
            check_judge(path, config_of("all", judge, **changes), other.tokenizer_meta)
    masked = case_config(data__synthetic_vocab_size=VOCAB)
    table = parameter_table(masked.model, data.vocabulary)
    save_weights(tmp_path / "run", masked, data, {name: torch.zeros(spec.shape) for name, spec in table.items()})
    with pytest.raises(UsageError, match="no sequence scorer .*objective.kind is masked"):
        check_judge(find_checkpoint(tmp_path / "run")[0], config, data.tokenizer_meta)
    with pytest.raises(ValueError, match="was not given"):
        objective_of(config)


@pytest.mark.parametrize("changes, complaint", [
    ({"objective__mask_ratio_power": 0.5}, "diffusion.weighting = count.*diffusion.weighting=simple"),
    ({"objective__entropy_threshold": 0.1, "diffusion__z_loss": 0.1}, "diffusion.z_loss = 0"),
    ({"objective__judge_exponent": 2.0}, "needs a judge"),
    ({"objective__label_smoothing": 0.1, "objective__kind": "autoregressive"}, "objective.kind = masked alone"),
    (SCORER | {"objective__judge": "x"}, "objective.kind = masked alone"),
    ({"objective__mask_ratio_power": 0.5, "diffusion__weighting": "simple", "model__critic": True,
      "objective__critic_alpha": 0.5, "objective__critic_weighting": True}, "objective.critic_weighting = true"),
    ({"objective__kind": "sequence_scoring"}, "model.score=true"),
    ({"model__labels": True}, "objective.kind = token_classification"),
    (SCORER | {"model__time_conditioning": "adaln"}, "tell the network"),
    (SCORER | {"diffusion__weighting": "simple"}, "fills no masks"),
])  # fmt: skip
def test_keys_that_contradict_each_other_are_named(changes, complaint):
    with pytest.raises(UsageError, match=f"(?s){complaint}"):
        case_config(**changes)
