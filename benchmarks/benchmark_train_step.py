"""A whole train step on one CPU thread: this project's loss against full logits and F.cross_entropy (LLaDA's form).

    python benchmarks/benchmark_train_step.py [--json] [--only fp32 bf16 124m memory]

Both arms run the same model on the same noised batches, half of whose tokens are masked: forward, backward, clipping,
fused AdamW (in bfloat16: on float32 master weights). They take turns, and CPU seconds are compared turn by turn, so
that other load disturbs little.

ratio_fp32, ratio_bf16: 6 layers x 384, 4 rows of 256. ratio_124m: 12 layers x 768, 1 row of 1024, float32.
memory_ratio: growth of resident memory by the loss of 8192 tokens at width 384, forward and backward, each arm in a
process of its own. The vocabulary is GPT-2's with the mask, 50258 ids.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import arguments, cpu_seconds, forget_peak, machine, median_ratio, peak_bytes, report, resident
from dlm_scale.config import ModelConfig
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.diffusion.corruption import Corrupted, corrupt
from dlm_scale.diffusion.objective import masked_diffusion
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.model.transformer import Transformer

VOCABULARY = Vocabulary(50258, 50257)
MEMORY_TOKENS, MEMORY_WIDTH = 8192, 384


@dataclass(frozen=True)
class Shape:
    num_layers: int
    hidden_size: int
    num_heads: int
    seq_len: int
    num_rows: int
    dtype: torch.dtype = torch.float32


SHAPES = {
    "fp32": Shape(6, 384, 6, 256, 4),
    "bf16": Shape(6, 384, 6, 256, 4, torch.bfloat16),
    "124m": Shape(12, 768, 12, 1024, 1),
}


def batch(shape: Shape, repeat: int) -> Corrupted:
    """Random ids, noised at the middles of the strata of time: half of the tokens are masked, as on average."""
    rows = np.arange(shape.num_rows)
    x0_BL = np.random.default_rng(repeat + 1).integers(0, VOCABULARY.mask_id, (shape.num_rows, shape.seq_len))
    return corrupt(x0_BL, rows, (rows + 0.5) / shape.num_rows, seed=repeat + 1,
                   schedule=SCHEDULES["linear"], weighting=WEIGHTINGS["count"], mask_id=VOCABULARY.mask_id,
                   denominator=x0_BL.size)  # fmt: skip


def our_loss(model: Transformer, corrupted: Corrupted) -> torch.Tensor:
    return masked_diffusion(model, corrupted)[0] / corrupted.denominator


def full_logits_loss(model: Transformer, corrupted: Corrupted) -> torch.Tensor:
    """Logits of all positions, then the cross-entropy of the masked ones."""
    everything = torch.arange(corrupted.xt_BL.numel())
    logits_NV = model(corrupted.xt_BL, m_B=corrupted.m_B, rows_N=everything,
                      readout=lambda head: F.linear(head.hidden_ND, model.head.weight))  # fmt: skip
    masked_N = corrupted.is_masked_BL.flatten()
    ce_N = F.cross_entropy(logits_NV[masked_N], corrupted.target_N, reduction="none")
    return (ce_N * corrupted.weight_N).sum() / corrupted.denominator


def train_step(shape: Shape, loss_of: Callable) -> Callable[[int], float]:
    """One arm: a model of its own, and a function that takes the step of a repeat and returns its loss."""
    torch.manual_seed(0)
    config = ModelConfig(num_layers=shape.num_layers, hidden_size=shape.hidden_size, num_heads=shape.num_heads,
                         seq_len=shape.seq_len)  # fmt: skip
    model = Transformer(config, VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()] if shape.dtype.itemsize == 2 else None
    model = model.to(shape.dtype)
    optimizer = torch.optim.AdamW(masters or model.parameters(), lr=1e-4, fused=True)

    def step(repeat: int) -> float:
        loss = loss_of(model, batch(shape, repeat))
        loss.backward()
        for master, parameter in zip(masters or (), model.parameters()):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters or model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters or (), model.parameters()):
                parameter.copy_(master)
        return loss.item()

    return step


def compare(name: str, repeats: int) -> dict[str, float]:
    """ratio_<name>, and both arms' median seconds; the losses must agree, or the ratio says nothing."""
    shape = SHAPES[name]
    ours, full = (train_step(shape, loss_of) for loss_of in (our_loss, full_logits_loss))
    a, b = ours(0), full(0)
    if abs(a - b) > (1e-4 if shape.dtype == torch.float32 else 2e-2) * abs(b):
        raise RuntimeError(f"{name}: the arms disagree about the loss: {a} and {b}")
    seconds = cpu_seconds({"full": full, "ours": ours}, repeats)
    return {
        f"ratio_{name}": median_ratio(seconds["full"], seconds["ours"]),
        f"seconds_{name}": float(np.median(seconds["ours"])),
        f"seconds_full_{name}": float(np.median(seconds["full"])),
    }


def loss_growth(arm: str) -> int:
    """Bytes by which resident memory grows over the loss of MEMORY_TOKENS tokens, half of them masked."""
    from dlm_scale import ops

    torch.set_num_threads(1)
    hidden_ND = torch.randn(MEMORY_TOKENS, MEMORY_WIDTH, requires_grad=True)
    weight_VD = torch.randn(VOCABULARY.num_outputs, MEMORY_WIDTH).mul_(0.02).requires_grad_()
    rows_N = torch.arange(0, MEMORY_TOKENS, 2)
    target_N, weight_N = torch.randint(0, VOCABULARY.num_outputs, (len(rows_N),)), torch.ones(len(rows_N))
    forget_peak()
    before = resident("VmRSS")
    if arm == "ours":
        loss = ops.linear_cross_entropy(hidden_ND.index_select(0, rows_N), weight_VD, target_N, weight_N)[0]
    else:
        ce_N = F.cross_entropy(F.linear(hidden_ND, weight_VD)[rows_N], target_N, reduction="none")
        loss = (ce_N * weight_N).sum()
    loss.backward()
    return resident("VmHWM") - before


def memory_ratio() -> dict[str, float]:
    grown = {arm: peak_bytes([__file__, "--loss_growth", arm]) for arm in ("ours", "full")}
    return {"memory_ratio": grown["ours"] / grown["full"], **{f"bytes_{arm}": n for arm, n in grown.items()}}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=[*SHAPES, "memory"], default=[*SHAPES, "memory"])
    parser.add_argument("--loss_growth", choices=["ours", "full"], help="print the bytes of one arm, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.loss_growth:
        print(loss_growth(args.loss_growth))
        return
    results: dict = {"benchmark": "train_step", "repeats": args.repeats} | machine()
    for name in args.only:
        results |= memory_ratio() if name == "memory" else compare(name, args.repeats)
    report(results, args.json)


if __name__ == "__main__":
    main()
