"""Why the squared error of predicted noise cannot train token vectors: what happens to them, and to the samples.

    python benchmarks/gaussian_collapse.py [--steps 1500] [--out FILE.json]

Rows count upwards modulo 8 from a random start, so a sample is right where a token follows its neighbour: one in eight
by chance. Every configuration trains one small network on the same batches in plain torch. `spread` is the mean distance
of two token vectors over what it was at the start, `share_right` that of the pairs of neighbours in 64 samples (DDIM, 32
steps).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dlm_scale.config import config_from_dict
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.diffusion.gaussian import noised
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.engine.objectives import objective_of, process_of
from dlm_scale.inference import Inference
from dlm_scale.model.initialise import initial_values
from dlm_scale.model.latent import vectors_of
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.sharding import full_box
from dlm_scale.model.transformer import Transformer
from dlm_scale.sampling.gaussian import stream

NUM_TOKENS, LENGTH, ROWS = 8, 12, 32
CASES = {  # what the seed states, what saves it, and the default
    "eps, mse, free": {"prediction": "eps", "loss": "mse", "embeddings": "free"},
    "eps, mse, unit_norm": {"prediction": "eps", "loss": "mse", "embeddings": "unit_norm"},
    "eps, mse, fixed": {"prediction": "eps", "loss": "mse", "embeddings": "fixed"},
    "v, vlb, unit_norm": {"prediction": "v", "loss": "vlb", "embeddings": "unit_norm"},
    "x0_softmax, ce, unit_norm": {"prediction": "x0_softmax", "loss": "ce", "embeddings": "unit_norm"},
}


def made(options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(config, vocabulary, network) of one configuration, from the seed."""
    config = config_from_dict({
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "seq_len": LENGTH, "tied": False,
                  "time_conditioning": "adaln"},
        "objective": {"kind": "gaussian"}, "gaussian": {"embedding_dim": 8, "num_steps": 200, **options},
        "data": {"train": "synthetic", "synthetic_vocab_size": NUM_TOKENS + 1},
        "train": {"global_batch_size": ROWS, "micro_batch_size": ROWS, "num_steps": 1, "out": "unused"},
        "optimizer": {"learning_rate": 3e-3},
    })  # fmt: skip
    vocabulary = Vocabulary(NUM_TOKENS + 1, NUM_TOKENS)
    table, model = parameter_table(config.model, vocabulary), Transformer(config.model, vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spec = table[name]
            values = initial_values(spec, 1, full_box(spec.view), 0, spec.numel)
            parameter.zero_()
            parameter[: spec.shape[0]] = torch.from_numpy(values).view(spec.shape)
    return config, vocabulary, model


def counting(start_B: np.ndarray) -> np.ndarray:
    return (start_B[:, None] + np.arange(LENGTH)) % NUM_TOKENS


def spread(model: Any, kind: str) -> float:
    """Mean distance of two different token vectors."""
    with torch.no_grad():
        return float(torch.pdist(vectors_of(model.embedding.weight[:NUM_TOKENS], kind)).mean())


def train(options: dict[str, Any], num_steps: int) -> dict[str, float]:
    """loss: mean of the last tenth of the steps."""
    config, vocabulary, model = made(options)
    objective, process, kind = objective_of(config), process_of(config.gaussian), config.gaussian.embeddings
    optimizer, before, losses = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), spread(model, kind), []
    for step in range(num_steps):
        index_B = step * ROWS + np.arange(ROWS)
        corrupted = noised(counting(index_B * 7 // 3), index_B, process.steps(stratified_times(1, step, ROWS)), seed=1, process=process,
                           mask_id=NUM_TOKENS, denominator=ROWS * LENGTH)  # fmt: skip
        loss = objective(model, corrupted, step)[0] / corrupted.denominator
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    found = {"loss": float(np.mean(losses[-max(1, num_steps // 10) :])), "spread": spread(model, kind) / before}
    return found | {"share_right": share_right(Inference(model, config, None, None, torch.device("cpu"), None, "param"))}


def share_right(inference: Inference, num_samples: int = 64) -> float:
    x_BL = torch.zeros(num_samples, LENGTH, dtype=torch.long)
    rows = {"request_hashes": [0] * num_samples, "sample_indices": range(num_samples)}
    *_, last = stream(inference.denoise, inference.token_vectors, inference.process, x_BL, x_BL > 0, sampler="ddim",
                      num_steps=32, seed=0, **rows)  # fmt: skip
    return float(((last.x_BL[:, 1:] - last.x_BL[:, :-1]) % NUM_TOKENS == 1).float().mean())


def report(num_steps: int, say: Callable[[str], None] = print) -> dict[str, dict[str, float]]:
    results = {}
    for name, options in CASES.items():
        results[name] = found = train(options, num_steps)
        say(f"{name:<28} loss {found['loss']:8.4f}  spread {found['spread']:.3f}  right {found['share_right']:.3f}")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = report(args.steps, partial(print, flush=True))
    if args.out:
        args.out.write_text(json.dumps({"steps": args.steps, "cases": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
