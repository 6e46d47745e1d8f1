"""Monte-Carlo error of the NELBO's estimators at equal forward passes, on a trained checkpoint.

    dlm prepare tinyshakespeare.txt --tokenizer char --out data/shakespeare_char
    dlm train configs/shakespeare_char_tiny.yaml
    python benchmarks/benchmark_nelbo.py runs/shakespeare_char_tiny --data data/shakespeare_char/val --json

Each estimator sees the same rows with the same number of passes, again and again with new masks; its error is the
standard deviation over the repeats, nats per token. `mdlm` is the estimator of MDLM (arXiv 2406.07524) from its
definition: t = eps + (1 - eps)(g + u_g)/G with eps = 1e-3, one u_g a stratum, every position masked on its own with
probability t, weight 1/t. `mdlm_rows` has the G strata over the rows of a batch, anew each pass, as its evaluation
does; `mdlm_passes` over the passes of each row. Ratios are to the better of the two.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import arguments, machine, report

from dlm_scale.data.loader import ValidationData
from dlm_scale.diffusion.corruption import assemble, replace
from dlm_scale.diffusion.draws import ESTIMATORS, evaluation_draws
from dlm_scale.diffusion.likelihood import sums_of_draws
from dlm_scale.diffusion.segments import row_bounds
from dlm_scale.engine.evaluation import cross_entropy_fn
from dlm_scale.inference import load_for_inference

EPS = 1e-3


def mdlm_draws(x0_BL: np.ndarray, mask_id: int, num_draws: int, seed: int, over: str) -> Any:
    """`num_draws` looks at all rows by MDLM's definition."""
    generator, (num_rows, length) = np.random.default_rng(seed), x0_BL.shape
    for draw in range(num_draws):
        uniform_B, rows_B = generator.random(num_rows), np.arange(num_rows)
        stratified_B = (rows_B + uniform_B) / num_rows if over == "rows" else (draw + uniform_B) / num_draws
        t_B = EPS + (1 - EPS) * stratified_B
        is_masked_BL = generator.random(x0_BL.shape) < t_B[:, None]
        weight_B = torch.from_numpy(1 / t_B)
        yield assemble(replace(x0_BL, is_masked_BL, row_bounds(num_rows, length), mask_id), weight_S=weight_B,
                       elbo_weight_S=weight_B, m_S=t_B, t_S=t_B, num_maskable_S=np.full(num_rows, length),
                       denominator=1.0)  # fmt: skip


def arms(x0_BL: np.ndarray, mask_id: int, num_draws: int) -> dict[str, Callable[[int], Any]]:
    """Name to draws(seed)."""
    index_B = np.arange(len(x0_BL))
    options = {"num_draws": num_draws, "mask_id": mask_id}
    ours = {name: (lambda seed, name=name: evaluation_draws(x0_BL, index_B, seed=seed, estimator=name, **options))
            for name in ESTIMATORS}
    theirs = {f"mdlm_{over}": (lambda seed, over=over: mdlm_draws(x0_BL, mask_id, num_draws, seed, over))
              for over in ("rows", "passes")}
    return theirs | ours


@torch.no_grad()
def errors(checkpoint: str, prefix: str, num_rows: int, num_draws: int, repeats: int) -> dict[str, Any]:
    """Means and standard deviations over the repeats of the mean of the rows, arms taking turns."""
    inference = load_for_inference(checkpoint, "cpu")
    data = ValidationData(prefix, inference.seq_len, num_rows)
    x0_BL, ce_fn = data.rows(np.arange(data.num_rows)), cross_entropy_fn(inference.model, inference.device)
    found: dict[str, list[np.ndarray]] = {}
    for seed in range(repeats):
        for name, draws in arms(x0_BL, inference.vocabulary.mask_id, num_draws).items():
            sums = sums_of_draws(ce_fn, np.arange(len(x0_BL)), draws(seed))
            found.setdefault(name, []).append(sums.weighted_ce_RK.mean(1) / x0_BL.shape[1])
    results: dict[str, Any] = {"rows": len(x0_BL), "draws": num_draws, "repeats": repeats, "step": inference.step}
    for name, values in found.items():
        mean = np.array(values).mean(1)
        # Rows are independent in all arms but mdlm_rows: there the spread of the mean itself, else that of the rows.
        spread = np.array(values).var(0, ddof=1).sum() ** 0.5 / len(x0_BL)
        results[f"{name}_mean"], results[f"{name}_sd_direct"] = mean.mean(), mean.std(ddof=1)
        results[f"{name}_sd"] = mean.std(ddof=1) if name == "mdlm_rows" else spread
    best = min(results["mdlm_rows_sd"], results["mdlm_passes_sd"])
    return results | {f"{name}_ratio": results[f"{name}_sd"] / best for name in ESTIMATORS}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="prefix of held-out text")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--draws", type=int, default=8)
    parser.set_defaults(repeats=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = errors(args.checkpoint, args.data, args.rows, args.draws, args.repeats)
    report(machine() | found, args.json)
    return int(any(math.isnan(found[f"{name}_sd"]) for name in ESTIMATORS))


if __name__ == "__main__":
    sys.exit(main())
