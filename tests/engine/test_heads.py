"""The critic and the sampler head: what they leave alone, that they learn, and whole runs with them to the text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dlm_scale import cli
from dlm_scale.config import config_from_dict
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.diffusion.corruption import corrupt
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.engine.objectives import objective_of, with_draws
from dlm_scale.engine.warm_start import open_origin
from dlm_scale.errors import UsageError
from dlm_scale.model.initialise import initial_values
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.sharding import full_box
from tests.engine.cases import case_config, import_distributed
from tests.engine.test_training import lines, run, status
from tests.engine.test_warm_start import save_weights
from tests.forked import run_ranks
from tests.model.test_model import made, randomised

SHAPE = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "seq_len": 8}
HEADS = {"critic": True, "sampler_head": True}
VOCABULARY = Vocabulary(6, 5)


def config_of(**objective):
    return case_config(**{f"model__{key}": value for key, value in (SHAPE | HEADS).items()},
                       **{f"objective__{key}": value for key, value in objective.items()})  # fmt: skip


def batch_of(config, x0_BL, first=0, step=0):
    index = first + np.arange(len(x0_BL))
    corrupted = corrupt(x0_BL, index, stratified_times(1, step, len(x0_BL)), seed=1, schedule=SCHEDULES["linear"],
                        weighting=WEIGHTINGS["count"], mask_id=5, denominator=float(x0_BL.size))  # fmt: skip
    return with_draws(config, corrupted, np.ones(x0_BL.shape, bool), index)


def gradients(step=0, model=None, **objective):
    """Gradients of a small model with random weights, and the loss."""
    model = model or randomised(made(VOCABULARY, **SHAPE, **HEADS))
    config = config_of(**objective)
    loss, stats = objective_of(config)(model, batch_of(config, np.random.default_rng(0).integers(0, 5, (4, 8))), step)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.detach(), stats


PLAIN = randomised(made(VOCABULARY, **SHAPE, **HEADS))


def plain_gradients():
    """Those of the same network in a model without the heads."""
    base = made(VOCABULARY, **SHAPE)
    weights = PLAIN.state_dict()
    base.load_state_dict({name: weights[name] for name in base.state_dict()})
    config = case_config(**{f"model__{key}": value for key, value in SHAPE.items()})
    batch = batch_of(config, np.random.default_rng(0).integers(0, 5, (4, 8)))
    loss, stats = objective_of(config)(base, batch, 0)
    loss.backward()
    return {name: p.grad for name, p in base.named_parameters()}, loss.detach(), stats


@pytest.mark.parametrize("objective", [
    {}, {"critic_alpha": 0.5, "critic_start": 3}, {"critic_alpha": 0.5, "critic_every": 2, "sampler_start": 9,
                                                   "sampler_alpha": 1.0},
])  # fmt: skip
def test_a_head_that_does_not_learn_now_leaves_every_bit(objective):
    found, loss, stats = gradients(1, **objective)
    plain, plain_loss, plain_stats = plain_gradients()
    assert loss.equal(plain_loss) and all(stats[name].equal(plain_stats[name]) for name in plain_stats)
    assert stats.keys() == plain_stats.keys() and all(found[name].equal(plain[name]) for name in plain)
    heads = found.keys() - plain.keys()
    assert len(heads) == 4 and all((found[name] == 0).all() for name in heads)  # there, and 0, at every layout


def test_the_sampler_head_and_a_detached_critic_leave_the_networks_gradients():
    plain, plain_loss, plain_stats = plain_gradients()
    found, loss, stats = gradients(critic_alpha=0.5, critic_detach=True, sampler_alpha=0.5)
    assert all(found[name].equal(plain[name]) for name in plain)
    assert all(found[name].abs().max() > 0 for name in found.keys() - plain.keys())
    assert stats.keys() - plain_stats.keys() == {"critic_bce", "critic_errors", "sampler_ce"}
    assert all(stats[name].equal(plain_stats[name]) for name in plain_stats) and loss > plain_loss
    attached, *_ = gradients(critic_alpha=0.5)
    assert not attached["blocks.0.mlp.down.weight"].equal(plain["blocks.0.mlp.down.weight"])
    weighted, *_ = gradients(critic_alpha=0.5, critic_detach=True, critic_weighting=True)
    assert not weighted["final_norm.gain"].equal(plain["final_norm.gain"])
    assert weighted["head.critic.weight"].equal(found["head.critic.weight"])  # the same draws, looked at the same way


def test_a_new_sampler_head_says_what_the_network_says():
    model = made(VOCABULARY, **SHAPE, **HEADS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("head.sampler"):
                parameter += 0.1
    x_BL, rows_N = torch.full((2, 8), 5), torch.arange(16)
    left_N, right_N = torch.arange(16) % 6 - 1, torch.arange(16) % 3 - 1
    both = model(x_BL, rows_N=rows_N, readout=lambda head: (head.log_probs(), head.local(left_N, right_N).log_probs()))
    assert both[0].equal(both[1])
    told = randomised(model)(x_BL, rows_N=rows_N, readout=lambda head: (head.local(left_N, right_N).logits(),
                                                                       head.local(right_N, left_N).logits()))  # fmt: skip
    assert not told[0].allclose(told[1])


def chain_rows(count, seed):
    """Rows of a chain in which an id is followed by itself or by the next one."""
    rng = np.random.default_rng(seed)
    steps_BL = np.concatenate([rng.integers(0, 5, (count, 1)), rng.random((count, 7)) < 0.5], axis=1)
    return steps_BL.cumsum(1) % 5


@pytest.fixture(scope="module")
def trained():
    """A small network after 300 steps on the chain, with both heads."""
    torch.manual_seed(0)
    model, config = made(VOCABULARY, **SHAPE, **HEADS), config_of(critic_alpha=0.5, critic_start=50, sampler_alpha=0.5)
    objective, optimizer = objective_of(config), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(300):
        corrupted = batch_of(config, chain_rows(32, step), 32 * step, step)
        loss, _ = objective(model, corrupted, step)
        optimizer.zero_grad()
        (loss / corrupted.denominator).backward()
        optimizer.step()
    return model.eval()


def test_a_trained_critic_tells_errors_from_others(trained):
    """Area under the curve of errors against right ids, on new rows."""
    from dlm_scale.diffusion.fill import draw, filled

    corrupted = batch_of(config_of(critic_alpha=0.5), chain_rows(400, 999), 10**6)
    with torch.no_grad():
        ids_N = trained(corrupted.xt_BL, rows_N=corrupted.rows_N, readout=lambda head: draw(head, corrupted))
        y_BL = filled(corrupted, ids_N)
        logit_N = trained(y_BL, rows_N=corrupted.rows_N, readout=lambda head: head.critic())
    wrong_N = y_BL.flatten()[corrupted.rows_N] != corrupted.target_N
    rank_N = logit_N.argsort().argsort().double() + 1
    positives, negatives = int(wrong_N.sum()), int((~wrong_N).sum())
    area = (float(rank_N[wrong_N].sum()) - positives * (positives + 1) / 2) / (positives * negatives)
    assert min(positives, negatives) > 300 and area > 0.65, area


def test_trained_waves_draw_two_neighbours_together(trained):
    """Two masks between known ids, in one pass: the head's second draw knows the first. Mean distance in total variation
    from the chain's joint law of the two, over 300 contexts; the product of true marginals would be at .164."""
    x_BL, rows_N = torch.from_numpy(chain_rows(300, 777)), (torch.arange(300)[:, None] * 8 + torch.tensor([3, 4])).flatten()
    step_VV = 0.5 * (torch.eye(5) + torch.eye(5).roll(1, 1))
    joint_BVV = step_VV[x_BL[:, 2], :, None] * step_VV * step_VV[:, x_BL[:, 5]].T[:, None, :]
    joint_BVV = joint_BVV / joint_BVV.sum((1, 2), keepdim=True)
    seen_BL, unknown = x_BL.clone(), torch.full((300,), -1)
    seen_BL[:, 3:5] = 5
    with torch.no_grad():
        view = trained(seen_BL, rows_N=rows_N, readout=lambda head: head)
        first_BD, second_BD = view.hidden_ND.view(300, 2, -1).unbind(1)
        read = lambda hidden, *beside: view.over(hidden).local(*beside).log_probs()[:, :5].exp()  # noqa: E731
        first_BV = read(first_BD, x_BL[:, 2], unknown)
        second_BVV = torch.stack([read(second_BD, torch.full((300,), v), x_BL[:, 5]) for v in range(5)], dim=1)
        alone_BV, also_BV = view.log_probs()[:, :5].exp().view(300, 2, 5).unbind(1)
    laws = {"waves": first_BV[:, :, None] * second_BVV, "product": alone_BV[:, :, None] * also_BV[:, None, :]}
    distance = {name: 0.5 * float((law - joint_BVV).abs().sum((1, 2)).mean()) for name, law in laws.items()}
    assert distance["waves"] < 0.8 * distance["product"], distance


WITH_HEADS = [f"model.{head}=true" for head in HEADS] + [
    "objective.critic_alpha=0.5", "objective.critic_every=2", "objective.sampler_alpha=0.5", "objective.sampler_start=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_with_heads(config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("heads")
    assert run(config_file, out, *WITH_HEADS) == 0
    return out


def test_metrics_say_what_the_heads_learn_in_the_steps_in_which_they_do(run_with_heads):
    steps = [line for line in lines(run_with_heads) if "loss" in line]
    assert [line["step"] for line in steps if "critic_bce" in line] == [1, 3, 5, 7, 9, 11]
    assert [line["step"] for line in steps if "sampler_ce" in line] == list(range(4, 13))
    assert all(0 < line["critic_errors"] <= 1 and line["critic_bce"] > 0 for line in steps if "critic_bce" in line)


def test_stop_and_resume_is_bit_equal(run_with_heads, config_file, tmp_path):
    assert run(config_file, tmp_path, *WITH_HEADS, "train.stop_at_step=5") == 0
    assert run(config_file, tmp_path, *WITH_HEADS) == 0
    assert status(tmp_path)["weights_hash"] == status(run_with_heads)["weights_hash"]


@pytest.mark.parametrize("sampler", ["critic", "local_waves"])
def test_text_by_every_command(sampler, run_with_heads, tmp_path, capfd):
    """`dlm sample`, a sweep, and offline batches whose bytes no batch size changes."""
    common = [f"--sampler={sampler}", "--seed=2", "--device=cpu"]
    arguments = ["sample", str(run_with_heads), *common, "--num_samples=2", "--steps=4", "--max_new_tokens=16", "--json"]
    assert run_ranks(1, cli.main, arguments) == [0]
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [one["nfe"] for one in report["samples"]] == [7 if sampler == "critic" else 4] * 2
    sweep = ["evaluate", str(run_with_heads), f"--sweep={sampler}", "--steps=2", "--generate=2", "--device=cpu",
             f"--out={tmp_path}/sweep", "--judge=ngram"]  # fmt: skip
    assert run_ranks(1, cli.main, sweep) == [0]
    assert json.loads((tmp_path / "sweep.json").read_text())["points"][0]["sampler"] == sampler
    prompts = [{"id": i, "tokens": [1, 2, 3][: i % 4], "max_new_tokens": 2 + 5 * (i % 3)} for i in range(9)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    made_ = {run_ranks(1, batches, run_with_heads, tmp_path, size, common)[0] for size in (1, 4, 64)}
    assert len(made_) == 1 and len(made_.pop().splitlines()) == 9


def batches(checkpoint, folder, size, flags) -> bytes:
    from dlm_scale.cli import Command, run_command

    files = [f"--input={folder}/in.jsonl", f"--output={folder}/{size}.jsonl", f"--batch_size={size}", "--steps=4"]
    assert run_command(Command("", "dlm_scale.sample_batch"), [str(checkpoint), *files, *flags], "sample_batch") == 0
    return (folder / f"{size}.jsonl").read_bytes()


@pytest.fixture
def base(tmp_path):
    """Random weights of the small model without heads."""
    from dlm_scale.data.loader import open_data

    config = case_config(data__synthetic_vocab_size=37)
    data, table = open_data("synthetic:37", 16, 5), parameter_table(config.model, Vocabulary(37, 36))
    save_weights(tmp_path / "run", config, data, {name: torch.randn(spec.shape) for name, spec in table.items()})
    return next((tmp_path / "run" / "checkpoints").iterdir()), config, data, table


def test_a_model_with_heads_starts_from_one_without(base):
    folder, config, data, table = base
    wanted = config_from_dict(config.model_dump(mode="json") | {"model": config.model.model_dump() | HEADS})
    initial, new = open_origin(folder, wanted, data), parameter_table(wanted.model, data.vocabulary)
    for name in new.keys() - table.keys():
        spec, whole = new[name], full_box(new[name].view)
        made_ = torch.from_numpy(initial_values(spec, config.train.seed, whole, 0, spec.numel))
        assert initial(spec, whole, 0, spec.numel).equal(made_)
    assert len(new) == len(table) + 4


def heads_of(checkpoint, ranks) -> list[torch.Tensor]:
    """What both heads of a checkpoint say at some positions, by plain passes and by passes of a fixed shape."""
    from dlm_scale.engine.runtime import start_runtime
    from dlm_scale.inference import load_for_inference
    from dlm_scale.sampling.fixed_shape import PASS_SHAPES, FixedShapePredict

    mesh = start_runtime("cpu", ranks).mesh
    inference = load_for_inference(checkpoint, device="cpu", mesh=mesh)
    x_BL = torch.randint(0, 5, (3, 16), generator=torch.Generator().manual_seed(0))
    rows_N, said = torch.arange(0, 48, 5), []
    fixed = FixedShapePredict(inference.model, inference.vocabulary.mask_id, torch.device("cpu"), PASS_SHAPES["cpu"])
    for predict in (inference.predict, fixed):
        log_probs, again = predict.local(x_BL, rows_N)
        told = again(torch.arange(10), rows_N % 4 - 1, rows_N % 3 - 1)
        said += [predict.critique(x_BL, rows_N), log_probs.exp(), told.exp()]
    return [one.numpy().copy() for one in said]


def test_a_tensor_parallel_group_says_the_same(run_with_heads):
    import_distributed()
    (alone,), (first, second) = (run_ranks(ranks, heads_of, run_with_heads, ranks) for ranks in (1, 2))
    for one, other, also in zip(alone, first, second, strict=True):
        assert (other == also).all() and np.abs(one - other).max() < 1e-5 and np.ptp(one) > 0


def test_a_checkpoint_without_a_head_is_refused_by_name(base):
    from dlm_scale.evaluate import check_samplers
    from dlm_scale.inference import load_for_inference

    inference = load_for_inference(base[0], device="cpu")
    for name, head in (("critic", "model.critic"), ("local_waves", "model.sampler_head")):
        with pytest.raises(UsageError, match=head):
            check_samplers([name], inference)


@pytest.mark.parametrize("bad, words", [
    ({"objective__critic_alpha": 0.5}, "model.critic=true"), ({"objective__sampler_alpha": 0.5}, "model.sampler_head=true"),
    ({"model__critic": True, "objective__critic_weighting": True}, "critic_alpha"),
    ({"model__critic": True, "objective__critic_alpha": 1.0, "objective__critic_start": 9, "objective__critic_end": 4},
     "before critic_start"),
    ({"model__critic": True, "objective__critic_alpha": 1.0, "objective__kind": "autoregressive"}, "no meaning"),
    ({"objective__critic_scope": "visible"}, "critic_scope"),
])  # fmt: skip
def test_keys_that_do_not_fit_are_refused(bad, words):
    with pytest.raises(UsageError, match=words):
        case_config(**bad)
