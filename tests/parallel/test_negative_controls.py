"""The comparison with the plain-torch twin would see it: one rule is taken away at a time, and the numbers differ.

Several of these leave the loss right to four digits, since Adam hides the scale of a gradient; norm and weights tell.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest

from tests.engine.cases import Case, differences, import_distributed, run_engine, twins
from tests.forked import run_ranks

STEPS, TOLERANCE = 3, 1e-5
SEQUENCE = Case(1, 2, 1, 1, True)
HEADS = Case(1, 2, 1, 1, False)


def replicated_sum_left_out(attribute):
    """Gradients of replicated parameters stay partial sums."""
    from dlm_scale.parallel import tensor_parallel

    whole = tensor_parallel.TensorLayers.__init__

    def init(self, *args):
        whole(self, *args)
        setattr(self, attribute, tensor_parallel.identity)

    return mock.patch.object(tensor_parallel.TensorLayers, "__init__", init)


def tail_sum_left_out():
    """Keys and values that ranks share keep the gradient of their own queries."""
    return mock.patch("dlm_scale.parallel.collectives.sum_gradient_of_tail", lambda weight, num_rows, group: weight)


def rows_summed_twice():
    """Selected rows give back the sum over the ranks, though every rank has the whole gradient already."""
    from dlm_scale.parallel.collectives import _SelectRows

    right = _SelectRows.backward
    return mock.patch.object(_SelectRows, "backward", staticmethod(lambda ctx, g: right(ctx, g * 2)))


def gathered_not_scattered():
    """The sequence gather's backward keeps its own part instead of the sum of all ranks' parts."""
    import torch.distributed as dist

    from dlm_scale.parallel import collectives

    def own_part(gradient, group):
        return gradient.chunk(dist.get_world_size(group), dim=collectives.SEQUENCE_DIM)[dist.get_rank(group)]

    broken = collectives._collective(collectives._all_gather, own_part)
    return mock.patch.object(collectives, "gather_sequence", broken)


def column_input_not_summed():
    """The column layer's input keeps the gradient of this rank's outputs."""
    from dlm_scale.parallel.tensor_parallel import Column

    init = Column.__init__

    def without(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.allreduce_dgrad, self.disable_grad_reduce = False, True

    return mock.patch.object(Column, "__init__", without)


def norm_counts_everything():
    """The norm counts replicated parameters on every tensor-parallel rank."""
    from dlm_scale.engine.state_access import StateAccess

    return mock.patch.object(StateAccess, "counted_ranges", lambda self, name, start, size: [(start, start + size)])


def norm_counts_first_rank():
    """The norm counts sharded parameters on tensor-parallel rank 0 alone, as DeepSpeed does where a mark is lost."""
    from dlm_scale.engine.state_access import StateAccess

    right = StateAccess.counted_ranges

    def first_only(self, *where):
        return [] if self.mesh.tensor_rank else right(self, *where)

    return mock.patch.object(StateAccess, "counted_ranges", first_only)


def loss_scaled(factor):
    """The loss that `backward` gets lacks a factor."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward = DeepSpeedEngine.backward
    return mock.patch.object(DeepSpeedEngine, "backward", lambda self, loss, **kw: backward(self, loss * factor, **kw))


def averaged_over_micro_batches():
    """DeepSpeed divides the gradient by the accumulation."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward = DeepSpeedEngine.backward
    return mock.patch.object(DeepSpeedEngine, "backward", lambda self, loss, **kw: backward(self, loss))


CONTROLS = {  # name: (case, what makes the patch; None: nothing is broken)
    "nothing (heads)": (HEADS, None),
    "nothing (sequence)": (SEQUENCE, None),
    "over_heads": (HEADS, lambda: replicated_sum_left_out("over_heads")),
    "over_sequence": (SEQUENCE, lambda: replicated_sum_left_out("over_sequence")),
    "over_sequence of the modulation": (Case(0, 2, 1, 1, True, "adaln"),
                                        lambda: replicated_sum_left_out("over_sequence")),
    "kv tail sum": (Case(1, 2, 1, 1, False, "mqa"), tail_sum_left_out),
    "select_rows backward": (SEQUENCE, rows_summed_twice),
    "gather_sequence backward": (SEQUENCE, gathered_not_scattered),
    "column input gradient": (HEADS, column_input_not_summed),
    "norm: is_counted": (HEADS, norm_counts_everything),
    "norm: shards": (HEADS, norm_counts_first_rank),
    "marks": (HEADS, lambda: mock.patch("dlm_scale.parallel.tensor_parallel._mark", lambda *_: None)),
    "factor: data_size": (Case(1, 1, 2), lambda: loss_scaled(0.5)),
    "factor: data_size, ZeRO 3": (Case(3, 1, 2), lambda: loss_scaled(0.5)),
    "factor: accumulation": (Case(2, 1, 2, 2), averaged_over_micro_batches),
}


def _run(names: list[str]) -> dict:
    """Each control in one process group (all of one layout)."""
    from dlm_scale.engine.runtime import start_runtime

    runtime, runs = start_runtime("cpu", CONTROLS[names[0]][0].tensor), {}
    for name in names:
        case, patch = CONTROLS[name]
        with patch() if patch else contextlib.nullcontext():
            runs[name] = run_engine(runtime, case.config(), STEPS)
    return runs


@pytest.fixture(scope="module")
def found():
    """Differences from the twin of every control."""
    import_distributed()
    twin = twins([case for case, _ in CONTROLS.values()], STEPS)
    runs = {}
    for tensor in (1, 2):
        names = [name for name, (case, _) in CONTROLS.items() if case.tensor == tensor]
        runs |= run_ranks(2, _run, names)[0]
    return {name: differences(run, twin[CONTROLS[name][0].model]) for name, run in runs.items()}


@pytest.mark.parametrize("name", [name for name, (_, patch) in CONTROLS.items() if patch is None])
def test_with_every_rule_in_place_it_is_equal(name, found):
    assert max(found[name][key] for key in ("loss", "grad_norm", "weights")) < TOLERANCE


@pytest.mark.parametrize("name", [name for name, (_, patch) in CONTROLS.items() if patch and name != "marks"])
def test_without_a_rule_it_is_not(name, found):
    assert found[name]["grad_norm"] > 10 * TOLERANCE, found[name]
    if not name.startswith(("norm", "factor")):  # these scale all gradients alike: Adam and clipping hide that
        assert found[name]["weights"] > 10 * TOLERANCE, found[name]


def test_marks_change_nothing(found):
    """Norm and clipping are computed from the parameter table, so lost marks of megatron's are harmless."""
    assert max(found["marks"][key] for key in ("loss", "grad_norm", "weights")) < TOLERANCE
