"""Bidirectional attention, forward and backward, every backend that runs here; dense rows, and packed documents.

    python benchmarks/benchmark_attention.py [--json] [--rows B] [--length L] [--heads H] [--head_dim E]

dense_ratio and packed_ratio: the time of the fastest backend over that of the one that ops.py chooses (1 is best).
fraction_of_matmul_rate: what the 14 B H L^2 E operations of the fastest dense one (4 forward, 10 backward) make of the
measured rate of matmuls. `skipped_X` says why a backend did not run. On a GPU: bfloat16. On a CPU: float32, one thread,
CPU milliseconds. Each packed row holds eight documents of random length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.common import arguments, cpu_seconds, gpu_milliseconds, machine, measured_roofline, report
from dlm_scale import ops

DOCUMENTS_A_ROW = 8


def packed_mask(num_rows: int, length: int, device: str) -> ops.Segments:
    rng = np.random.default_rng(0)
    cuts = [row * length + np.sort(rng.choice(np.arange(1, length), DOCUMENTS_A_ROW - 1, replace=False))
            for row in range(num_rows)]  # fmt: skip
    bounds = np.concatenate([*cuts, np.arange(num_rows + 1) * length])
    return ops.Segments(torch.from_numpy(np.sort(bounds).astype(np.int32)).to(device))


def measured(args, device: str, dtype: torch.dtype, mask: ops.AttentionMask) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of each backend that runs here, and why the others do not. Those that switch torch's own
    FlashAttention come last, so that `sdpa` is measured without them."""
    shape = (args.rows, args.length, args.heads, args.head_dim)
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    dout = torch.randn(shape, device=device).to(dtype)
    times, skipped = {}, {}
    for name in sorted(ops.ATTENTION_BACKENDS, key=lambda name: ops.ATTENTION_BACKENDS[name].switch is not None):
        if obstacle := ops.why_not(name, device, dtype, args.head_dim, type(mask)):
            skipped[name] = obstacle
            continue
        arm = {name: partial(forward_and_backward, q, k, v, mask, name, dout)}
        times |= milliseconds(arm, device, args.repeats)
    return times, skipped


def forward_and_backward(q, k, v, mask, backend: str, dout, *_) -> None:
    torch.autograd.grad(ops.attention(q, k, v, mask, backend=backend), (q, k, v), dout)


def milliseconds(arm: dict[str, Callable], device: str, repeats: int) -> dict[str, float]:
    if device == "cuda":
        return gpu_milliseconds(arm, repeats)
    return {name: 1e3 * sorted(s)[len(s) // 2] for name, s in cpu_seconds(arm, repeats).items()}


def main() -> None:
    has_gpu = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=16 if has_gpu else 2)
    parser.add_argument("--length", type=int, default=4096 if has_gpu else 512)
    parser.add_argument("--heads", type=int, default=16 if has_gpu else 4)
    parser.add_argument("--head_dim", type=int, default=128 if has_gpu else 64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    results: dict = {"benchmark": "attention", "repeats": args.repeats} | machine()
    masks = {"dense": ops.Full(), "packed": packed_mask(args.rows, args.length, device)}
    for kind, mask in masks.items():
        times, skipped = measured(args, device, dtype, mask)
        name, why = ops.choose_attention("auto", device, dtype, args.head_dim, type(mask))
        results |= {f"{kind}_milliseconds_{arm}": ms for arm, ms in times.items()}
        results |= {f"{kind}_skipped_{arm}": obstacle for arm, obstacle in skipped.items()}
        results |= {f"{kind}_chosen": f"{name} ({why})", f"{kind}_ratio": min(times.values()) / times[name]}
    operations = 14.0 * args.rows * args.heads * args.length**2 * args.head_dim
    fastest = min(ms for key, ms in results.items() if key.startswith("dense_milliseconds"))
    results["fraction_of_matmul_rate"] = operations / fastest / 1e9 / measured_roofline(device)["tflops"]
    report(results, args.json)


if __name__ == "__main__":
    main()
