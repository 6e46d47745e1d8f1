"""From clean ids to noised ids, masked rows and weights: one Triton launch, eager torch, torch.compile, numpy.

    python benchmarks/benchmark_masking.py [--json] [--rows 64] [--length 1024]

On a GPU: microseconds, with the number of masked positions known beforehand (as when the host drew the same masks a
batch ahead). Without one: CPU seconds of numpy and of the torch reference, one thread. fraction_of_bandwidth: what 41
bytes a token and 20 a masked one make of the measured bandwidth of copying; on a CPU the random words are the cost.
`skipped_X` says why an arm did not run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.common import arguments, cpu_seconds, gpu_milliseconds, machine, measured_roofline, median_ratio, report
from dlm_scale.diffusion.corruption import corrupt
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.kernels.masking import Noise, mask_tokens_ref

MASK_ID = 50257
BYTES_A_TOKEN = 8 + 8 + 1 + 8 + 8 + 4 + 2 + 2  # ids in, noised ids, mask; the lists' zeroing; the mask and ids again
BYTES_A_MASKED = 8 + 8 + 4


def on_gpu(x0_BL, index_B, noise: Noise, repeats: int) -> dict:
    from dlm_scale.kernels.masking_triton import mask_tokens

    x0_BL, index_B = x0_BL.cuda(), index_B.cuda()
    noise = noise._replace(mask_ratio_S=noise.mask_ratio_S.cuda())
    count = len(mask_tokens(x0_BL, index_B, noise, mask_id=MASK_ID).rows_N)
    compiled = torch.compile(mask_tokens_ref)
    times = gpu_milliseconds(
        {
            "triton": lambda: mask_tokens(x0_BL, index_B, noise, mask_id=MASK_ID, num_rows=count),
            "eager": lambda: mask_tokens_ref(x0_BL, index_B, noise, mask_id=MASK_ID),
            "compile": lambda: compiled(x0_BL, index_B, noise, mask_id=MASK_ID),
        },
        repeats,
    )
    moved = BYTES_A_TOKEN * x0_BL.numel() + BYTES_A_MASKED * count
    reached = moved / times["triton"] / 1e9 / measured_roofline("cuda")["tbytes_per_second"]
    found = {f"microseconds_{name}": 1e3 * ms for name, ms in times.items()}
    ratios = {f"ratio_{name}": times[name] / times["triton"] for name in ("eager", "compile")}
    return found | ratios | {"fraction_of_bandwidth": reached}


def on_cpu(x0_BL, index_B, noise: Noise, repeats: int) -> dict:
    def by_numpy(repeat: int):
        corrupt(x0_BL, index_B.numpy(), noise.mask_ratio_S.numpy(), seed=noise.seed, schedule=SCHEDULES["linear"],
                weighting=WEIGHTINGS["count"], mask_id=MASK_ID, denominator=1.0)  # fmt: skip

    seconds = cpu_seconds(
        {"numpy": by_numpy, "torch": lambda repeat: mask_tokens_ref(x0_BL, index_B, noise, mask_id=MASK_ID)}, repeats
    )
    found = {f"seconds_{name}": float(np.median(times)) for name, times in seconds.items()}
    masked = mask_tokens_ref(x0_BL, index_B, noise, mask_id=MASK_ID)
    moved = BYTES_A_TOKEN * x0_BL.numel() + BYTES_A_MASKED * len(masked.rows_N)
    reached = moved / found["seconds_numpy"] / 1e12 / measured_roofline("cpu")["tbytes_per_second"]
    found |= {"ratio_numpy": median_ratio(seconds["torch"], seconds["numpy"]), "fraction_of_bandwidth": reached}
    return found | {"skipped_triton": "needs a GPU", "skipped_compile": "needs a GPU"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x0_BL = torch.from_numpy(np.random.default_rng(0).integers(0, MASK_ID, (args.rows, args.length)))
    noise = Noise(torch.from_numpy(stratified_times(0, 0, args.rows)), None, seed=1)
    run = on_gpu if torch.cuda.is_available() else on_cpu
    results = {"benchmark": "masking", "rows": args.rows, "length": args.length, "repeats": args.repeats} | machine()
    report(results | run(x0_BL, torch.arange(args.rows), noise, args.repeats), args.json)


if __name__ == "__main__":
    main()
