"""ZeRO 3 holds a shard and the layer it computes, never the model."""

from __future__ import annotations

import pytest
import torch

from dlm_scale import ops  # noqa: F401  (imported once, before the fork)
from tests.engine.cases import case_config, data_of, import_distributed
from tests.forked import run_ranks

RANKS, VOCAB = 4, 8192
WIDE = {  # one of 70B's layers is 0.86 G parameters
    "model__hidden_size": 8192, "model__num_heads": 64, "model__num_kv_heads": 8, "model__ffn_size": 28672,
    "model__num_layers": 2, "model__seq_len": 16, "data__synthetic_vocab_size": VOCAB, "train__precision": "bf16",
    "train__micro_batch_size": 2, "zero__stage": 3,
}
OVERHEAD = 1e9  # python, torch, deepspeed and buffers


def status_bytes(field: str) -> int:
    """A memory field of this process: VmHWM is the peak of resident memory since `reset_peak`."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _forward(_=None) -> dict:
    from dlm_scale.engine.build import _zero_init
    from dlm_scale.engine.deepspeed_config import deepspeed_dict
    from dlm_scale.engine.runtime import import_deepspeed, start_runtime
    from dlm_scale.model.transformer import Transformer

    reset_peak()
    runtime, config = start_runtime("cpu", 1), case_config(**WIDE)
    deepspeed, ds_config = import_deepspeed(), deepspeed_dict(config, 1)
    vocabulary = data_of(config).vocabulary
    with _zero_init(deepspeed, 3, ds_config, runtime):
        model = Transformer(config.model, vocabulary)
    built = status_bytes("VmHWM")
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_tensor.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(number))
    xt_BL, rows_N = torch.arange(32).view(2, 16), torch.tensor([0, 5, 31])
    with torch.no_grad():
        log_probs_NV = engine(xt_BL, rows_N=rows_N, readout=lambda head: head.log_probs())
    numels = {name: p.ds_numel for name, p in model.named_parameters()}
    return {
        "peak": status_bytes("VmHWM"), "built": built, "numels": numels, "sum": float(log_probs_NV.exp().sum(1).mean()),
        "shard": sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters()),
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_70b_wide_model_needs_a_shard_a_layer_and_a_gigabyte():
    import_distributed()
    ranks = run_ranks(RANKS, _forward, seconds=500.0)
    layer = 2 * sum(n for name, n in ranks[0]["numels"].items() if name.startswith("blocks.0."))
    model = 2 * sum(ranks[0]["numels"].values())
    for number, rank in enumerate(ranks):
        print(f"rank {number}: built {rank['built'] / 1e9:.2f} GB, peak {rank['peak'] / 1e9:.2f} GB; model "
              f"{model / 1e9:.2f}, shard {rank['shard'] / 1e9:.2f}, layer {layer / 1e9:.2f} GB")
        assert rank["shard"] <= model / RANKS + 1e5
        assert rank["peak"] <= rank["shard"] + layer + OVERHEAD
        assert rank["sum"] == pytest.approx(1.0, abs=1e-3)
