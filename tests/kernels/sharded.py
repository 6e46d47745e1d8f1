"""One linear cross-entropy over tensor-parallel ranks, against the same on one."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dlm_scale.kernels.linear_cross_entropy import LossTerms
from dlm_scale.parallel.dist_env import dist_env, start_process_group
from tests.forked import run_ranks
from tests.kernels.oracles import Problem, found_by, problem, relative_error

TERMS = LossTerms(softcap=20.0, z_loss=1e-2, label_smoothing=0.1)
VOCABS = (7, 129)  # 7 over 4 ranks, padded to 3 a rank: the last shard has no allowed id
NUM_ROWS = 12
ROWS_OF_A_SHARD = {(7, 2): 4, (7, 4): 3, (129, 2): 66, (129, 4): 33}


def cases() -> list[tuple[int, LossTerms, int]]:
    """(vocabulary, terms, rows); the targets include the first and last id of each shard."""
    return [(vocab, terms, rows) for vocab in VOCABS for terms in (LossTerms(), TERMS) for rows in (0, NUM_ROWS)]


def border_problem(vocab: int, num_rows: int, size: int) -> Problem:
    made, shard = problem(num_rows, vocab), ROWS_OF_A_SHARD[vocab, size]
    borders = [b for k in range(size) for b in (k * shard, (k + 1) * shard - 1) if b < vocab - 1]
    made.target_N[: len(borders)] = torch.tensor(borders, dtype=torch.int64)[:num_rows]
    return made


def _shard(made: Problem, size: int, rank: int) -> tuple[list, int]:
    """This rank's padded rows of the table, and the id that they begin at."""
    inputs, rows = made.inputs(torch.float32), ROWS_OF_A_SHARD[len(made.weight_VD), size]
    padding = size * rows - len(made.weight_VD)
    table = torch.cat([made.weight_VD.float(), torch.ones(padding, made.weight_VD.shape[1])])
    bias = torch.cat([inputs[4], torch.full((padding,), -torch.inf)])
    here = slice(rank * rows, (rank + 1) * rows)
    inputs[1], inputs[4] = table[here].clone().requires_grad_(), bias[here]
    return inputs, rank * rows


def _of_rank(loss_fn, scores_fn, size: int) -> list[dict]:
    start_process_group(dist_env(), "gloo")
    found = []
    for vocab, terms, num_rows in cases():
        made = border_problem(vocab, num_rows, size)
        inputs, start = _shard(made, size, dist.get_rank())
        out = found_by(loss_fn, inputs, terms, vocab_start=start, group=dist.group.WORLD)
        scores = scores_fn(inputs[0].detach(), inputs[1].detach(), made.target_N, inputs[4], start, dist.group.WORLD,
                           terms.softcap)  # fmt: skip
        found.append({name: value.numpy() for name, value in (out | scores._asdict()).items()})
    return found


def assert_sharded_equals_whole(loss_fn, scores_fn, size: int) -> None:
    """Loss, side outputs, scores and gradients within 1e-6 of one rank's; the table's gradients by their rows."""
    ranks = run_ranks(size, _of_rank, loss_fn, scores_fn, size)
    for number, (vocab, terms, num_rows) in enumerate(cases()):
        made = border_problem(vocab, num_rows, size)
        whole = found_by(loss_fn, made.inputs(torch.float32), terms)
        whole |= scores_fn(*(x.float() for x in (made.hidden_ND, made.weight_VD)), made.target_N, made.bias_V.float(),
                           softcap=terms.softcap)._asdict()  # fmt: skip
        shards = [{name: torch.from_numpy(value) for name, value in rank[number].items()} for rank in ranks]
        dweight = torch.cat([shard["dweight"] for shard in shards])
        assert not dweight[vocab:].any()
        for shard in shards:
            shard["dweight"] = dweight[:vocab]
            for name, wanted in whole.items():
                if wanted.dtype.is_floating_point:
                    error = relative_error(shard[name], wanted.double())
                    assert error <= 1e-6, (vocab, terms, num_rows, name, error)
                else:
                    assert torch.equal(shard[name], wanted), (vocab, terms, num_rows, name)
