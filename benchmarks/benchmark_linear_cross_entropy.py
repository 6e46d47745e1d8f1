"""Weighted cross-entropy of the vocabulary projection, forward and backward, half of the tokens masked.

    python benchmarks/benchmark_linear_cross_entropy.py [--json] [--tokens N] [--width D] [--vocab V]

Arms: `ours` (what ops.py runs here), `reference` (its torch form on the same masked rows), `full` (logits of all
tokens, F.cross_entropy of the masked ones), and on a GPU `compile` (torch.compile of `full`), and Liger and quack on
the masked rows, unweighted, where installed; `skipped_X` says why an arm did not run. ratio_X is X's time over ours;
fraction_of_matmul_rate, what 6 N V D operations on the MASKED rows make of the measured rate of matmuls. On a GPU:
bfloat16, 65536 tokens, and the extra memory. On a CPU: float32, 1024 tokens, one thread, CPU seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks.common import arguments, cpu_seconds, gpu_milliseconds, machine, measured_roofline, median_ratio, report
from dlm_scale import ops


def full_loss(hidden_TD, weight_VD, rows_N, target_N, weight_N):
    ce_N = F.cross_entropy(F.linear(hidden_TD, weight_VD)[rows_N].float(), target_N, reduction="none")
    return (ce_N * weight_N).sum()


def arms(tokens: int, width: int, vocab: int, device: str, dtype: torch.dtype) -> dict[str, Callable]:
    """Each makes the loss and its gradients once."""
    generator = torch.Generator(device).manual_seed(0)
    hidden_TD = torch.randn(tokens, width, device=device, generator=generator).to(dtype).requires_grad_()
    weight_VD = (0.02 * torch.randn(vocab, width, device=device, generator=generator)).to(dtype).requires_grad_()
    rows_N = torch.arange(0, tokens, 2, device=device)
    target_N = torch.randint(0, vocab, (len(rows_N),), device=device, generator=generator)
    weight_N = torch.rand(len(rows_N), device=device, generator=generator) + 0.5

    def on_rows(loss_of: Callable) -> Callable:
        return lambda: loss_of(hidden_TD.index_select(0, rows_N), weight_VD, target_N, weight_N)

    def with_backward(loss_of: Callable) -> Callable:
        def run(*_):
            loss_of().backward()
            hidden_TD.grad = weight_VD.grad = None

        return run

    everything = (hidden_TD, weight_VD, rows_N, target_N, weight_N)
    losses = {
        "ours": on_rows(lambda *x: ops.linear_cross_entropy(*x)[0]),
        "reference": on_rows(lambda *x: ops.linear_cross_entropy_outputs(*x, backend="reference").loss_sum),
        "full": lambda: full_loss(*everything),
    }
    if device == "cuda":
        compiled = torch.compile(full_loss)
        losses |= {"compile": lambda: compiled(*everything)}
        losses |= {name: on_rows(FOREIGN[name]()) for name, obstacle in skipped(device).items() if obstacle is None}
    return {name: with_backward(loss) for name, loss in losses.items()}


def liger_loss() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden_ND, weight_VD, target_N, _: liger(weight_VD, hidden_ND, target_N)


def quack_loss() -> Callable:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden_ND, weight_VD, target_N, _: chunked_linear_cross_entropy(
        hidden_ND, weight_VD, target_N, reduction="sum"
    )


FOREIGN = {"liger": liger_loss, "quack": quack_loss}  # kernels of others; they take no weight a token


def skipped(device: str) -> dict[str, str | None]:
    """Why an arm does not run here; None for those of others that do."""
    if device != "cuda":
        return dict.fromkeys(("compile", *FOREIGN), "needs a GPU")
    found: dict[str, str | None] = {}
    for name, make in FOREIGN.items():
        try:
            make()
            found[name] = None
        except ImportError as error:
            found[name] = f"not installed: {error}"
    return found


def on_gpu(made: dict[str, Callable], repeats: int) -> dict:
    times = gpu_milliseconds(made, repeats)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made["ours"]()
    extra = torch.cuda.max_memory_allocated() - before
    found = {f"milliseconds_{name}": ms for name, ms in times.items()}
    found |= {f"ratio_{name}": ms / times["ours"] for name, ms in times.items() if name != "ours"}
    return found | {"seconds_ours": times["ours"] / 1e3, "extra_bytes": extra}


def on_cpu(made: dict[str, Callable], repeats: int) -> dict:
    seconds = cpu_seconds(made, repeats)
    ratios = {f"ratio_{name}": median_ratio(t, seconds["ours"]) for name, t in seconds.items() if name != "ours"}
    return {f"seconds_{name}": sorted(times)[len(times) // 2] for name, times in seconds.items()} | ratios


def main() -> None:
    has_gpu = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=65536 if has_gpu else 1024)
    parser.add_argument("--width", type=int, default=768 if has_gpu else 384)
    parser.add_argument("--vocab", type=int, default=50304)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    made = arms(args.tokens, args.width, args.vocab, device, dtype)
    found = (on_gpu if has_gpu else on_cpu)(made, args.repeats)
    rate = 6e-12 * len(range(0, args.tokens, 2)) * args.vocab * args.width / found["seconds_ours"]
    found |= {"backend": ops.chosen_backends()["linear_cross_entropy"], "tflops": rate}
    found |= {"fraction_of_matmul_rate": rate / measured_roofline(device)["tflops"]}
    found |= {f"skipped_{name}": why for name, why in skipped(device).items() if why}
    shape = {"tokens": args.tokens, "width": args.width, "vocab": args.vocab, "repeats": args.repeats}
    report({"benchmark": "linear_cross_entropy"} | shape | machine() | found, args.json)


if __name__ == "__main__":
    main()
